"""`ncml evaluate`: the paper's tables and figures, measured on model folders.

    report_folder     runs the requested kinds of evaluation in order and writes their folder; read it first
    inputs       the models, the image sets and the limits of an evaluation
    image_sets   data sets read at the size of a model, or generated
    cache        measurements on disk, so that an evaluation resumes
    bootstrap    means, shares and detection rates with intervals
    report       tables and figures as Markdown, CSV, PNG and JSON
    published    the paper's own numbers, printed next to ours and marked as such
    likelihood   Tables 1 and 3
    sanity       the sanity test of Section 3.1 (Figure 2, Eq. 6), and compressed size
    robustness   Figure 4
    ood          Tables 2 and 4
    distances    networks whose features compare images, and distances in them
    variety      precision, recall, and the variance within classes
    quality      FID, or a distance in named features, variety, white noise; quality against steps and start noise
    samples      Figures 1 and 5 to 10
    probe        a linear classifier of features, independent of the model, with which options are chosen
    pixel_classifier  a classifier of pixels, with which nothing is chosen
    class_samples     what both recognise in samples of all classes, and how the samples vary
    classes      knowledge of classes in likelihoods and in generated images
    tuning       candidates for the default sampling options of a model, measured (`ncml tune`)
    recommendation    the chosen options, written to the model folder

Each kind is a function from `inputs.Inputs` to a `report.Section`. This package neither trains nor calibrates models,
nor serves them; it trains classifiers to judge their images.
"""
