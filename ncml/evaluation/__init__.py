"""The paper's tables and figures, measured on model folders: what `ncml evaluate` does.

    published    the paper's own numbers, printed beside ours and marked as such
    pictures     the data sets: read at the size of a model, or generated
    store        rows measured so far, on disk, so that an evaluation resumes
    numbers      means and detection rates with bootstrap intervals
    report       tables and figures as Markdown, CSV, PNG and JSON
    likelihood   Tables 1 and 3; the sanity test of Section 3.1 (Figure 2, Eq. 6), and compressed size
    robustness   Figure 4
    ood          Tables 2 and 4
    quality      FID, or a distance in named features; quality against refinement steps and start noise
    samples      Figures 1 and 5 to 10
    context      what an evaluation works with
    run          which of these, for which models, in which order

Each kind is a function from a `context.Context` to a `report.Section`. Nothing here trains, calibrates or serves.
"""
