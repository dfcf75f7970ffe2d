// Accessibility that Gradio's page does not have, for visitors without a mouse or without sight. The before/after handle becomes a
// slider with keyboard control, images and buttons get names, and the result is announced. Gradio may create its elements again at
// any time, so this script runs again after every change of the page.
(() => {
  const NAMES = [ // selector, attribute, values in the order of the found elements
    ["#result img[data-testid=imageslider-image]", "alt", ["Before: the noisy image", "After: the denoised image"]],
    ["#upload img[data-testid=detailed-image], #upload .image-frame img", "alt", ["The image to be denoised"]],
    ["#heat img", "alt", ["Energy of each patch: bright where the model is unsure"]],
    ["#examples .gallery-item", "aria-label", ["Example: a cat", "Example: a cup of coffee", "Example: a rocket at night"]],
    ["#upload input[type=file]", "accept", ["image/*,.heic,.heif,.avif"]], // some systems do not list these as images
    ["fieldset#how", "aria-label", ["Noise"]],
    ["#answer .overflow-menu > button", "aria-label", ["More tabs"]],
    ["#facts, #repair-facts", "role", ["status", "status"]],
    ["#repaired img[data-testid=imageslider-image]", "alt", ["Before: the photograph", "After: the repaired photograph"]],
    ["#repair-photo img[data-testid=detailed-image], #repair-photo .image-frame img", "alt", ["The photograph to be repaired"]],
    ["#mask img[data-testid=detailed-image], #mask .image-frame img", "alt", ["The mask: white where pixels are missing"]],
    ["#repair-photo input[type=file], #mask input[type=file]", "accept", Array(2).fill("image/*,.heic,.heif,.avif")],
    ["fieldset#damage, fieldset#scale", "aria-label", ["Damage", "Enlarge by"]],
  ];
  const STEPS = { ArrowLeft: -2, ArrowDown: -2, ArrowRight: 2, ArrowUp: 2, PageDown: -10, PageUp: 10, Home: -100, End: 100 };
  const known = new WeakSet();

  const set = (element, name, value) => element.getAttribute(name) === value || element.setAttribute(name, value);

  // Position of the handle in percent of the width, from 0 (left) to 100.
  function position(handle) {
    const left = new DOMMatrix(getComputedStyle(handle).transform).m41;
    return Math.round((100 * left) / Math.max(handle.parentElement.clientWidth, 1));
  }

  // Gradio offers no function to move its handle, so this sends mouse events.
  function drag(handle, pixels) {
    const box = handle.getBoundingClientRect();
    const at = (x) => ({ view: window, bubbles: true, cancelable: true, button: 0, clientX: x, clientY: box.top + box.height / 2 });
    const x = box.left + box.width / 2;
    handle.dispatchEvent(new MouseEvent("mousedown", at(x)));
    window.dispatchEvent(new MouseEvent("mousemove", at(x + pixels)));
    window.dispatchEvent(new MouseEvent("mouseup", at(x + pixels)));
  }

  function tell(handle) {
    const left = position(handle);
    set(handle, "aria-valuenow", String(left));
    set(handle, "aria-valuetext", `before on the left ${left} percent, after on the right ${100 - left} percent`);
  }

  function adopt(handle) {
    const fixed = { role: "slider", tabindex: "0", "aria-label": "Border between before and after", "aria-orientation": "horizontal" };
    for (const [name, value] of Object.entries({ ...fixed, "aria-valuemin": "0", "aria-valuemax": "100" })) set(handle, name, value);
    tell(handle);
    if (known.has(handle)) return;
    known.add(handle);
    new MutationObserver(() => tell(handle)).observe(handle, { attributeFilter: ["style"] });
    handle.addEventListener("keydown", (event) => {
      const percent = STEPS[event.key];
      if (percent === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      const target = Math.min(Math.max(position(handle) + percent, 0), 100);
      drag(handle, ((target - position(handle)) * handle.parentElement.clientWidth) / 100);
    });
  }

  function look() {
    for (const [selector, attribute, texts] of NAMES)
      document.querySelectorAll(selector).forEach((element, index) => texts[index] && set(element, attribute, texts[index]));
    document.querySelectorAll("#result [data-testid=slider], #repaired [data-testid=slider]").forEach(adopt);
    document.querySelectorAll("svg:not([role], [aria-label])").forEach((icon) => set(icon, "aria-hidden", "true"));
    // A button inside a link would be two tab stops for one action.
    document.querySelectorAll("a.download-link:has(> button)").forEach((link) => {
      set(link, "aria-label", "Download");
      set(link.querySelector("button"), "tabindex", "-1");
    });
  }

  let waiting = false;
  const soon = () => {
    if (waiting) return;
    waiting = true;
    setTimeout(() => ((waiting = false), look()), 50);
  };
  new MutationObserver(soon).observe(document, { childList: true, subtree: true });
  soon();
})();
