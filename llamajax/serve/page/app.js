// The page: draws the conversations and does what buttons and keys ask for.

import {
  forgetConversation,
  keep,
  keepConversation,
  newConversation,
  recall,
  recallConversations,
  watchOtherTabs,
} from "./conversations.js";
import { $, announce, copy, followEnd, make, makeButton, sendOnEnter } from "./dom.js";
import { drawMarkdown } from "./markdown.js";
import { fetchModel, fetchProgress, streamAnswer } from "./server.js";

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const plural = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;

let conversations = recallConversations();
let current = newConversation();
let model = null;
let ready = false;
const running = new Map(); // a conversation -> the AbortController of its answer
const elements = new WeakMap(); // a message -> its element
const goToEnd = followEnd($("#scroller"), $("#messages"), (left) => ($("#to-end").hidden = !left));

// ---- Drawing

function drawAll() {
  drawList();
  $("#title").value = current.title;
  document.title = current.title ? `${current.title} · llamajax` : "llamajax";
  $("#messages").replaceChildren(...current.messages.map(messageElement));
  $("#welcome").hidden = current.messages.length > 0;
  fillSettings();
  drawState();
  goToEnd();
}

function drawList() {
  const items = conversations.map((conversation) => {
    const open = makeButton(conversation.title, () => show(conversation));
    open.ariaCurrent = conversation === current ? "page" : null;
    return make("li", {}, open);
  });
  $("#list").replaceChildren(...items);
}

/** Draws what depends on the server, and on whether an answer is being written. */
function drawState() {
  const answering = running.has(current);
  $("#send").textContent = answering ? "Stop" : "Send";
  $("#send").disabled = !ready && !answering;
  $("#messages").classList.toggle("answering", answering);
  $("#delete").hidden = $("header h1").hidden = !conversations.includes(current);
  const used = current.messages.findLast(({ usage }) => usage)?.usage.total_tokens;
  const size = model?.max_model_len;
  $("#context").hidden = !used || !size;
  if (used && size) {
    Object.assign($("#context meter"), { max: size, value: used, high: 0.9 * size });
    $("#context span").textContent = `${used.toLocaleString("en")} of ${plural(size, "token")}`;
  }
}

function messageElement(message) {
  const user = message.role === "user";
  const body = make("div", { className: "body", dir: "auto" });
  if (user) body.textContent = message.content;
  else drawMarkdown(body, message.content);
  const name = make("h2", { className: "unseen", textContent: user ? "You" : "Answer" });
  const item = make("li", { className: message.role }, name, body, make("div", { className: "foot" }));
  elements.set(message, item);
  drawFoot(message);
  return item;
}

/** Draws the line below a message: its error, figures and buttons. */
function drawFoot(message) {
  const foot = elements.get(message)?.querySelector(".foot");
  if (!foot) return;
  const last = message === current.messages.at(-1);
  const answering = last && running.has(current);
  foot.parentElement.ariaBusy = answering ? "true" : null;
  foot.replaceChildren();
  if (answering) return;
  if (message.error) foot.append(make("p", { className: "error", textContent: message.error }));
  if (message.role === "assistant") foot.append(figures(message));
  if (message.content) foot.append(makeButton("Copy", (event) => copy(message.content, event.target)));
  if (message.role === "user") foot.append(makeButton("Edit", () => edit(message)));
  else if (last) foot.append(makeButton(message.error ? "Try again" : "Regenerate", regenerate));
}

function figures({ usage, rate, finish, error }) {
  const ends = { length: "cut off by the token limit", stopped: "stopped" };
  const parts = [
    usage && plural(usage.completion_tokens, "token"),
    rate && `${rate.toFixed(1)} tokens/s`,
    ends[finish] ?? (finish || error ? "" : "interrupted"),
  ];
  return make("span", { textContent: parts.filter(Boolean).join(" · ") });
}

let drawing = null; // the timer of the next drawing
let took = 0; // how long the last one took, in ms

/** Draws the answer that grows: at most 12 times a second, and less often if a drawing takes long. */
function drawSoon() {
  drawing ??= setTimeout(
    () => {
      drawing = null;
      const start = performance.now();
      const message = current.messages.at(-1);
      if (running.has(current)) drawMarkdown(elements.get(message).querySelector(".body"), message.content);
      took = performance.now() - start;
    },
    Math.max(80, 4 * took),
  );
}

/** Shows a notice above the prompt, or none for "". `action` is the name of a button that does `act`. */
function notify(text, action, act) {
  const [said, does] = $("#notice").children;
  if (said.textContent !== text) said.textContent = text; // or it would be read aloud again
  $("#notice").hidden = !text;
  Object.assign(does, { textContent: action ?? "", hidden: !action, onclick: () => (notify(""), act()) });
}

// ---- Conversations

function show(conversation) {
  current = conversation;
  if ($("#sidebar").matches(":popover-open")) $("#sidebar").hidePopover();
  drawAll();
  if (matchMedia("(hover: hover)").matches) $("#prompt").focus(); // where it does not bring up a keyboard
}

/** Keeps a conversation; says so if the browser has no room for it. */
function save(conversation) {
  if (!conversations.includes(conversation)) return; // it is new or was deleted
  const full = "The browser has no room to keep this conversation. Delete others, or it is lost when the page closes.";
  if (!keepConversation(conversation)) notify(full);
  else if ($("#notice span").textContent === full) notify("");
}

function rename(title) {
  current.title = title.trim() || current.title;
  save(current);
  drawList();
}

function remove() {
  const removed = current;
  const place = conversations.indexOf(removed);
  running.get(removed)?.abort();
  conversations = conversations.filter((conversation) => conversation !== removed);
  forgetConversation(removed);
  show(conversations[place] ?? conversations.at(-1) ?? newConversation());
  notify(`Deleted “${removed.title}”.`, "Undo", () => {
    conversations.splice(place, 0, removed);
    save(removed);
    show(removed);
  });
}

// ---- Asking and answering

/** Whether the current conversation can have an answer now. Says why if the server is the reason. */
function canAsk() {
  if (!ready) notify(`Not sent: ${$("#model").textContent}`);
  return ready && !running.has(current);
}

/** Asks in the current conversation, after the messages before `at`; those from there on are replaced. */
function ask(text, at = current.messages.length) {
  if (!text.trim() || !canAsk()) return false;
  const before = at < current.messages.length ? [...current.messages] : null;
  current.messages.splice(at, Infinity, { role: "user", content: text });
  current.title ||= text.trim().split("\n")[0].slice(0, 80);
  current.changed = Date.now();
  conversations = [current, ...conversations.filter((conversation) => conversation !== current)];
  answer(current, before);
  return true;
}

function regenerate() {
  if (!canAsk()) return;
  const before = [...current.messages];
  const replaced = current.messages.pop();
  answer(current, replaced.content ? before : null);
  $("#prompt").focus();
}

/** Adds an answer to a conversation. `before`: the messages to go back to if not even its first word comes, or null. */
async function answer(conversation, before) {
  const body = { model: model.id, messages: history(conversation), ...conversation.settings, system: undefined };
  const message = { role: "assistant", content: "" };
  const controller = new AbortController();
  conversation.messages.push(message);
  running.set(conversation, controller);
  notify("");
  drawAll();
  save(conversation);
  announce("Writing an answer");
  try {
    await readAnswer(streamAnswer(body, recall("llamajax.key"), controller.signal), message, () => save(conversation));
  } catch (error) {
    // A browser that leaves the page ends its connections a moment before. That is no error to keep.
    if (error.status === 0) await pause(500);
    if (error.name === "AbortError") message.finish = "stopped";
    else message.error = error.message;
    if (error.status === 401) askForKey();
    else if (message.error) watchServer();
  }
  running.delete(conversation);
  if (before && !message.content) {
    conversation.messages = before;
    if (conversation === current) drawAll();
    notify(message.error ?? "");
  }
  save(conversation);
  const text = elements.get(message).querySelector(".body");
  drawMarkdown(text, message.content);
  drawFoot(message);
  drawState();
  announce(message.error ?? text.textContent);
}

async function readAnswer(chunks, message, keepPart) {
  let first, last, kept;
  for await (const { choices, usage } of chunks) {
    const choice = choices[0];
    if (choice?.delta.content) {
      last = performance.now();
      first ??= last;
      message.content += choice.delta.content;
      drawSoon();
      if (last - (kept ??= last) > 1000) keepPart((kept = last));
    }
    if (choice?.finish_reason) message.finish = choice.finish_reason;
    if (usage) message.usage = usage;
  }
  const tokens = message.usage?.completion_tokens;
  if (tokens > 1 && last > first) message.rate = (1000 * (tokens - 1)) / (last - first);
}

/** The messages to send. Answers that are empty are left out. */
function history({ settings, messages }) {
  const said = messages.filter(({ content }) => content).map(({ role, content }) => ({ role, content }));
  return settings.system ? [{ role: "system", content: settings.system }, ...said] : said;
}

function edit(message) {
  const item = elements.get(message);
  const text = make("textarea", { value: message.content, ariaLabel: "Edit your message" });
  const leave = () => {
    item.replaceWith(messageElement(message));
    elements.get(message).querySelector("button:last-of-type").focus();
  };
  const send = () => ask(text.value, current.messages.indexOf(message)) && $("#prompt").focus();
  sendOnEnter(text, send);
  text.addEventListener("keydown", (event) => event.key === "Escape" && leave());
  item.querySelector(".body").replaceChildren(text);
  item.querySelector(".foot").replaceChildren(makeButton("Send", send), makeButton("Cancel", leave));
  text.focus();
}

// ---- The server's state

let watching = false;

/** Waits until the server is ready, and shows what it is doing. Messages can be sent once the model is loaded. */
async function watchServer() {
  if (watching) return;
  watching = true;
  for (;;) {
    try {
      const progress = await fetchProgress();
      model = await fetchModel(recall("llamajax.key"));
      if (!ready && model.max_model_len) {
        notify("");
        announce("The model is ready");
      }
      ready = Boolean(model.max_model_len);
      if (!ready) sayState("Not ready yet", progress);
      else sayState(model.id, roomOf(model), progress || model.id);
      if (!progress) break;
    } catch (error) {
      ready = false;
      sayState("Not ready yet", error.message);
      if (error.status === 401) {
        askForKey();
        break;
      }
    }
    await pause(1000);
  }
  watching = false;
}

const roomOf = ({ max_model_len: size }) => `Conversations of up to ${plural(size, "token")}, kept in this browser`;

/** Shows it in a new conversation, and on the line at the bottom. */
function sayState(title, details, line = details) {
  $("#welcome h1").textContent = title;
  $("#welcome p").textContent = details;
  $("#model").textContent = line;
  drawState();
}

// ---- Settings

const settings = $("#settings form");

function fillSettings() {
  settings.reset();
  for (const [name, value] of Object.entries(current.settings)) settings.elements[name].value = value;
  settings.elements.key.value = recall("llamajax.key", "");
}

function readSettings() {
  const fields = [...settings.elements].filter((field) => field.name && field.value && field.checkValidity());
  const values = fields.map(({ name, type, value }) => [name, type === "number" ? Number(value) : value]);
  const { key = "", ...rest } = Object.fromEntries(values);
  current.settings = rest;
  keep("llamajax.settings", rest);
  keep("llamajax.key", key);
  save(current);
}

let refusedKey = null;

function askForKey() {
  const { key } = settings.elements;
  refusedKey = key.value;
  $("#key-error").textContent = key.value ? "The server refused this API key." : "The server asks for an API key.";
  $("#key-error").hidden = false;
  if (!$("#settings").open) $("#settings").showModal();
  key.focus();
}

// ---- Buttons and keys

const prompt = $("#prompt");

function submit() {
  if (ask(prompt.value)) prompt.value = "";
}

sendOnEnter(prompt, submit);
$("#composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running.has(current)) running.get(current).abort();
  else submit();
  prompt.focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !$(":modal, :popover-open")) running.get(current)?.abort();
});
document.addEventListener("click", ({ target }) => {
  if ("copyCode" in target.dataset) copy(target.parentElement.querySelector("code").textContent.trimEnd(), target);
});
$("#new").onclick = () => show(newConversation());
$("#delete").onclick = remove;
$("#to-end").onclick = goToEnd;
$("#open-settings").onclick = () => $("#settings").showModal();
$("#title").onchange = ({ target }) => rename(target.value);
settings.oninput = readSettings;
$("#settings").onclose = () => {
  $("#key-error").hidden = true;
  if (!ready && settings.elements.key.value !== refusedKey) watchServer();
};
addEventListener("pagehide", () => [...running.keys()].forEach(save));
addEventListener("pageshow", ({ persisted }) => persisted && location.reload());
watchOtherTabs((id, changed) => {
  const known = conversations.find((conversation) => conversation.id === id);
  if (running.has(known)) return;
  conversations = conversations.filter((conversation) => conversation !== known);
  if (changed) conversations.unshift(changed);
  if (known !== current) return drawList();
  current = changed ?? newConversation();
  drawAll();
});

current = conversations[0] ?? current;
drawAll();
watchServer();
