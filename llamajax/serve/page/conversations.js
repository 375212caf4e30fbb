// What the browser keeps: conversations, one entry of localStorage each, and settings.
//
// A conversation: { id, title, changed, settings, messages }. A message: { role, content }; an answer has also
// `finish` (OpenAI's finish_reason, or "stopped"), `error`, `usage` and `rate` (tokens a second). An answer without
// `finish` and `error` was interrupted: the page was closed while it was written.

const PREFIX = "llamajax.conversation.";

/** A value that was kept. */
export function recall(name, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(name)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

/** Keeps a value. Returns whether the browser had room for it. */
export function keep(name, value) {
  try {
    localStorage.setItem(name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

/** All conversations that are kept, the last changed first. */
export function recallConversations() {
  try {
    const names = Object.keys(localStorage).filter((name) => name.startsWith(PREFIX));
    const kept = names.map((name) => recall(name)).filter((conversation) => conversation?.messages);
    return kept.sort((a, b) => b.changed - a.changed);
  } catch {
    return []; // the browser allows no storage
  }
}

export function newConversation() {
  const id = Date.now().toString(36) + Math.random().toString(36).slice(2, 8);
  return { id, title: "", changed: Date.now(), settings: recall("llamajax.settings", {}), messages: [] };
}

export const keepConversation = (conversation) => keep(PREFIX + conversation.id, conversation);

export function forgetConversation({ id }) {
  try {
    localStorage.removeItem(PREFIX + id);
  } catch {
    // the browser allows no storage, so there is nothing to forget
  }
}

/** Calls `changed(id, conversation or null)` when another tab keeps or forgets a conversation. */
export function watchOtherTabs(changed) {
  addEventListener("storage", ({ key, newValue }) => {
    if (key?.startsWith(PREFIX)) changed(key.slice(PREFIX.length), JSON.parse(newValue));
  });
}
