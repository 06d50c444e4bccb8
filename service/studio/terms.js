// Explanations of terms, which the first view does not need.

import { explain } from "./fields.js";

const EXPLANATIONS = {
  "bits/dim":
    "Bits per dimension: the average number of bits that the model needs to encode one red, green or blue value of " +
    "the image. Lower means more likely. Without a model, every value takes 8 bits.",
  multiscale_corr:
    "An OOD score: how far an image lies from held-out images. It combines, at several noise levels, the likelihood, " +
    "the gradient of the log-density and the variation of the bits across pixels, and adds correlations between " +
    "neighbouring pixels that the model does not explain. Higher means more out-of-distribution.",
  multiscale:
    "An OOD score: how far an image lies from held-out images. It combines, at several noise levels, the likelihood, " +
    "the gradient of the log-density and the variation of the bits across pixels. " +
    "Higher means more out-of-distribution.",
  scenes:
    "A scene is what was photographed once. The images of a burst, copies of an image and crops of one photograph " +
    "show the same scene and count once in the ranks, because they look alike.",
  guidance: "The influence of the class. Above 1, images show their class more clearly and vary less.",
  temperature: "Below 1, likely values become more likely and images smoother. Above 1, images vary more.",
  solver:
    "A solver turns a noisy sample into a clean image. tweedie does it in one step. heun takes several steps and " +
    "adds no noise; euler-maruyama and predictor-corrector add noise at each step.",
};

/** A question-mark button that explains a term; nothing for a term without an explanation. */
export const explainTerm = (term) => (term in EXPLANATIONS ? explain(term, EXPLANATIONS[term]) : []);
