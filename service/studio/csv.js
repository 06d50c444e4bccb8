// The CSV table of the scored images.

const COLUMNS = [
  ...["image", "bits_per_dim", "nats", "statistic", "ood_score", "threshold", "p_value", "out_of_distribution"],
  ...["view", "box_left", "box_top", "box_width", "box_height", "class", "noise"],
  ...["model", "version", "calibration", "calibration_version"],
];

/** The table of readings. With ./ in front, spreadsheets take no file name for a formula. */
export function csv(readings) {
  const lines = [COLUMNS, ...readings.map(csvRow)].map((cells) => cells.map(csvCell).join());
  return lines.map((line) => `${line}\r\n`).join("");
}

function csvRow({ name, score, scan, model, conditions }) {
  const { bpd, log_likelihood: nats, score: worst, ood, detection } = score;
  const { score: oodScore = worst, threshold, p_value: pValue } = ood ?? {};
  const { calibration, calibration_version: calibrationVersion } = ood ?? {};
  const { view, box: { left, top, width, height } = {} } = scan ?? detection ?? {};
  const statistic = scan ? "tiles" : ood?.statistic; // as in the tables of the command line
  const isOod = ood && (ood.is_ood ? "yes" : "no");
  const noise = scan ? "" : (conditions.noise ?? 0);
  return [
    ...[name.replace(/^[=+@-]/, "./$&"), bpd, nats, statistic, oodScore, threshold, pValue, isOod],
    ...[view, left, top, width, height, conditions.class, noise],
    ...[model.name, model.version, calibration, calibrationVersion],
  ];
}

const csvCell = (value) => (/[",\r\n]/.test(value ?? "") ? `"${value.replaceAll('"', '""')}"` : (value ?? ""));
