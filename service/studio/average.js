// The average bits/dim of a model, with which those of an image are compared.

/** The average of a model's test images, or else of images held out from its training, and their name; or null. */
export function averageBpd({ detector, metrics }) {
  if (detector) return null; // that of its base says nothing about a detector
  if (metrics.test_bpd) return { images: "Test images", bpd: metrics.test_bpd.toFixed(2) };
  return metrics.held_out_bpd ? { images: "Held-out images", bpd: metrics.held_out_bpd.toFixed(2) } : null;
}
