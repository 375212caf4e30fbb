// Markdown of a model, drawn safely and while it is being written. A model's text is untrusted: its HTML is shown as
// text, images become links, and what the parser makes of the rest is sanitized.

import { Marked } from "./vendor/marked-18.2.1.js";
import "./vendor/dompurify-3.5.0.js"; // defines the global DOMPurify

const ENTITIES = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };
const escape = (text) => text.replace(/[&<>"']/g, (character) => ENTITIES[character]);

const marked = new Marked({
  breaks: true,
  renderer: {
    html: ({ text, block }) => (block ? `<pre><code>${escape(text)}</code></pre>` : escape(text)),
    image: ({ href, text }) => `<a href="${escape(href)}">${escape(text || href)}</a>`,
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
  },
});

const ALLOWED = {
  ALLOWED_TAGS:
    "a blockquote br code del em h1 h2 h3 h4 h5 h6 hr li ol p pre strong table tbody td th thead tr ul".split(" "),
  ALLOWED_ATTR: ["href", "title", "class", "align", "start"],
  ADD_URI_SAFE_ATTR: ["align", "start"],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

const drawn = new WeakMap(); // a block's element -> the HTML that it shows

/** Draws Markdown into an element, block by block. Blocks that did not change stay, with what is selected in them. */
export function drawMarkdown(element, text) {
  const blocks = toBlocks(text);
  blocks.forEach((html, i) => {
    const block = element.children[i] ?? element.appendChild(document.createElement("div"));
    if (drawn.get(block) === html) return;
    drawn.set(block, html);
    block.replaceChildren(window.DOMPurify.sanitize(html, ALLOWED));
    block.querySelectorAll("a[href]").forEach(openElsewhere);
    block.querySelectorAll("table").forEach(letScroll);
    block.querySelectorAll("pre").forEach(addCopyButton);
  });
  while (element.children.length > blocks.length) element.lastChild.remove();
}

/** The HTML, not yet sanitized, of each paragraph, list, table, ... */
function toBlocks(text) {
  try {
    const tokens = marked.lexer(text).filter(({ type }) => type !== "space");
    return tokens.map((token) => marked.parser([token]));
  } catch {
    return [`<pre><code>${escape(text)}</code></pre>`]; // nested too deeply, such as 8,000 times ">"
  }
}

function openElsewhere(link) {
  link.target = "_blank";
  link.rel = "noopener noreferrer nofollow";
}

function letScroll(table) {
  const box = document.createElement("div");
  box.className = "table";
  box.tabIndex = 0;
  table.replaceWith(box);
  box.append(table);
}

function addCopyButton(pre) {
  const language = /language-(\S+)/.exec(pre.firstElementChild?.className ?? "")?.[1] ?? "";
  const box = document.createElement("div");
  const name = document.createElement("span");
  const button = document.createElement("button");
  box.className = "code";
  name.textContent = language;
  button.type = "button";
  button.textContent = "Copy";
  button.dataset.copyCode = "";
  button.ariaLabel = `Copy ${language} code`.replace("  ", " ");
  pre.tabIndex = 0;
  pre.replaceWith(box);
  box.append(name, button, pre);
}
