// Worklet that hands the samples of the first channel of the microphone to the page.
class Capture extends AudioWorkletProcessor {
  process(inputs) {
    if (inputs[0].length) this.port.postMessage(inputs[0][0].slice());
    return true;
  }
}

registerProcessor("capture", Capture);
