// Elements: how they are found, made, read aloud, and kept at the end of what is scrolled.

export const $ = (selector) => document.querySelector(selector);

export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

export const makeButton = (text, onclick) =>
  make("button", { type: "button", className: "quiet", textContent: text, onclick });

/** Has a screen reader say it. */
export function announce(text) {
  $("#announcer").textContent = text;
}

/** Copies a text, and says so on the button that asked for it. */
export async function copy(text, button) {
  const label = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // A page that came by plain HTTP from another machine has no clipboard; the old way still works there.
    const area = document.body.appendChild(make("textarea", { value: text, className: "unseen" }));
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus();
  }
  button.textContent = "Copied";
  announce("Copied");
  setTimeout(() => (button.textContent = label), 1500);
}

/** Enter sends, Shift+Enter breaks the line; Enter that ends the input of a character (IME) does neither. */
export function sendOnEnter(textarea, send) {
  textarea.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
}

/**
 * Keeps the end of content that grows in sight, unless the reader scrolls up. Returns a function that goes to the end.
 * `left` is called with whether the reader has left the end.
 */
export function followEnd(scroller, content, left) {
  let following = true;
  let lastTop = 0;
  const go = () => {
    following = true;
    scroller.scrollTop = scroller.scrollHeight;
  };
  scroller.addEventListener("scroll", () => {
    const atEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 8;
    // The end may be out of sight because the content has grown, too: only a way up is the reader's.
    following = atEnd || (following && scroller.scrollTop >= lastTop);
    lastTop = scroller.scrollTop;
    left(!following);
  });
  const resized = new ResizeObserver(() => following && go());
  resized.observe(scroller);
  resized.observe(content);
  return go;
}
