// The button that sends the request of a form, with one that cancels the upload of its files.

import { button, disable } from "./dom.js";

const QUICK_MS = 300; // within which most uploads end, which then do not change the buttons

export class Sender {
  controller = null; // of the request that is being sent
  isSlow = false;
  cancelButton = button("Cancel", () => this.cancel());

  /** `label()` is what `submitButton` does; `isReady()` is whether it can be pressed; `onChange` follows changes. */
  constructor(submitButton, { label, isReady, busyLabel = "Uploading", onChange = () => {} }) {
    Object.assign(this, { submitButton, label, isReady, busyLabel, onChange });
  }

  get isBusy() {
    return this.controller !== null;
  }

  update() {
    const { submitButton, isBusy, isSlow } = this;
    disable(submitButton, isBusy || !this.isReady());
    submitButton.setAttribute("aria-busy", isBusy);
    submitButton.textContent = isSlow ? this.busyLabel : this.label();
    this.cancelButton.hidden = !isSlow;
    this.onChange();
  }

  /** Perform `action(signal)`, whose signal is aborted if the user cancels; does nothing while another one runs. */
  async run(action) {
    if (this.isBusy) return;
    this.controller = new AbortController();
    const timer = setTimeout(() => this.setSlow(true), QUICK_MS);
    this.update();
    try {
      await action(this.controller.signal);
    } finally {
      clearTimeout(timer);
      this.controller = null;
      this.setSlow(false);
    }
  }

  setSlow(isSlow) {
    this.isSlow = isSlow;
    this.update();
  }

  cancel() {
    this.controller?.abort();
    this.submitButton.focus();
  }
}
