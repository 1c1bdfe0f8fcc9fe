// Puts the interface into the browser's language, or the one that its reader chose: the page is written in English, and
// what stands in Gradio's table of translations is said in the other language wherever it is seen, also when it changes.
//
// A key of the table is what the page shows; "{}" stands for anything (a name, a link, words that are keys themselves),
// "{#}" for a number, and its translation has "{}" for them in the same order, or "{0}", "{1}" … in another. A sentence
// with elements in it (<b>, <a>, <code>) is one key, with a hole for each of them.
(() => {
  const CHOICE = 'language', VALUE = '=';
  // What is no word of the interface: code, formulas, rows of data, answers, a notebook that is read.
  const BESIDE = 'script, style, textarea, pre, code, .katex, [translate=no], #tokens, #preview, '
    + '[id^=column-] [role=option], #lesson:has(pre)';
  const WRITTEN = '.html-container, .prose, .toast-body'; // where Gradio leaves the elements of a sentence alone
  const ATTRIBUTES = ['placeholder', 'title', 'aria-label', 'alt'];
  const [OPEN, SHUT] = ['\ue000', '\ue001']; // around the number of an element in a sentence
  const HOLES = {'{}': '([^]+?)', '{#}': `([-+−±~<>≤≥ ]*[0-9][0-9.,]*(?:e[-+]?[0-9]+)?|${OPEN}[0-9]+${SHUT})`};
  const MOST_KNOWN = 5000;

  const kept = (language) => {
    try {
      if (language) localStorage.setItem(CHOICE, language);
      return localStorage.getItem(CHOICE);
    } catch { return null; } // a browser that keeps nothing for pages takes its own language each time
  };
  const chosen = kept();
  if (chosen) Object.defineProperty(navigator, 'language', {get: () => chosen}); // where Gradio looks for it

  let exact = new Map(), patterns = [], known = new Map();
  const was = new WeakMap(); // node -> {attribute, or '' for text, or VALUE -> [English, what was put there]}
  const moved = new Map(); // element -> [its own nodes, the nodes put there]

  const read = (table) => {
    const literal = (text) => text.replace(/[.*+?^${}()|[\]\\]/g, '\\$&');
    for (const [marked, other] of Object.entries(table)) {
      if (!marked.startsWith(MARK)) continue; // Gradio's own
      const english = marked.slice(MARK.length);
      const pieces = english.split(/\{#?\}/), holes = english.match(/\{#?\}/g);
      if (holes === null) { exact.set(english, other); continue; }
      const length = pieces.join('').length;
      const longest = pieces.reduce((one, two) => two.length > one.length ? two : one);
      const rule = new RegExp(
        `^${pieces.map((piece, at) => literal(piece) + (at < holes.length ? HOLES[holes[at]] : '')).join('')}$`);
      patterns.push({rule, longest, length, other});
    }
    patterns.sort((one, two) => two.length - one.length); // the most telling first
  };

  const say = (text) => {
    const key = text.trim().replace(/\s+/g, ' ');
    if (!/[a-z]/i.test(key) || key.length > 2000) return null;
    if (known.has(key)) return known.get(key);
    let said = exact.get(key) ?? null;
    if (said === null) {
      for (const {rule, longest, other} of patterns) {
        const found = key.includes(longest) && rule.exec(key);
        if (!found) continue;
        let next = 1;
        said = other.replace(/\{(\d*)\}/g, (_, place) => {
          const part = found[place === '' ? next++ : 1 + Number(place)];
          return say(part) ?? part;
        });
        break;
      }
    }
    if (known.size > MOST_KNOWN) known = new Map();
    known.set(key, said);
    return said;
  };

  const around = (text, said) => text.match(/^\s*/)[0] + said + text.match(/\s*$/)[0];

  const note = (node, name, english, said) => {
    if (!was.has(node)) was.set(node, {});
    was.get(node)[name] = [english, said];
  };

  const text = (node) => {
    if (was.get(node)?.['']?.[1] === node.data) return;
    const said = say(node.data);
    if (said === null) return;
    const whole = around(node.data, said);
    note(node, '', node.data, whole);
    node.data = whole;
  };

  const attributes = (element) => {
    for (const name of ATTRIBUTES) {
      const value = element.getAttribute(name);
      if (!value || was.get(element)?.[name]?.[1] === value) continue;
      const said = say(value);
      if (said === null) continue;
      note(element, name, value, said);
      element.setAttribute(name, said);
    }
  };

  // The chosen word of a list that opens is the value of a field. The page, which set it in English, reads it in English.
  const value = Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value');
  const LISTS = 'input[role=combobox][readonly]';
  Object.defineProperty(HTMLInputElement.prototype, 'value', {
    ...value,
    get() {
      const shown = value.get.call(this), [english, said] = was.get(this)?.[VALUE] ?? [];
      return said !== undefined && said === shown ? english : shown;
    },
    set(english) {
      const said = spoken !== 'en' && this.matches(LISTS) ? say(String(english)) : null;
      if (said !== null) note(this, VALUE, english, said);
      value.set.call(this, said ?? english);
    },
  });

  // A sentence with elements in it, which another language may want in another order.
  const sentence = (element) => {
    if (!element.firstElementChild || !element.closest(WRITTEN)) return;
    const nodes = [...element.childNodes], inside = [];
    if (!nodes.some((node) => node.nodeType === Node.TEXT_NODE && /[a-z]/i.test(node.data))) return;
    let key = '';
    for (const node of nodes) {
      if (node.nodeType === Node.TEXT_NODE) key += node.data;
      else if (node.nodeType === Node.ELEMENT_NODE) key += OPEN + (inside.push(node) - 1) + SHUT;
    }
    const said = say(key);
    if (said === null) return;
    const put = said.split(/(\ue000\d+\ue001)/).filter(Boolean)
      .map((part) => part.startsWith(OPEN) ? inside[Number(part.slice(1, -1))] : document.createTextNode(part));
    moved.set(element, [nodes, put]);
    element.replaceChildren(...put);
  };

  const all = (root) => {
    if (root.nodeType === Node.TEXT_NODE) {
      if (root.parentElement && !root.parentElement.closest(BESIDE)) text(root);
      return;
    }
    if (root.nodeType !== Node.ELEMENT_NODE || root.closest(BESIDE)) return;
    const walk = document.createTreeWalker(root, NodeFilter.SHOW_ELEMENT | NodeFilter.SHOW_TEXT, (node) =>
      node.nodeType === Node.ELEMENT_NODE && node.matches(BESIDE) ? NodeFilter.FILTER_REJECT : NodeFilter.FILTER_ACCEPT);
    for (let node = walk.currentNode; node; node = walk.nextNode()) {
      if (node.nodeType === Node.TEXT_NODE) { text(node); continue; }
      sentence(node);
      attributes(node);
      if (node.matches(LISTS)) node.value = node.value;
    }
  };

  const back = () => {
    for (const [element, [nodes, put]] of moved) {
      if (put.every((node) => node.parentNode === element)) element.replaceChildren(...nodes);
    }
    moved.clear();
    const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_ELEMENT | NodeFilter.SHOW_TEXT);
    for (let node = walk.currentNode; node; node = walk.nextNode()) {
      for (const [name, [english, said]] of Object.entries(was.get(node) ?? {})) {
        if (name === '' && node.data === said) node.data = english;
        else if (name === VALUE) node.value = english;
        else if (name !== '' && node.getAttribute(name) === said) node.setAttribute(name, english);
      }
      was.delete(node);
    }
  };

  const watch = new MutationObserver((changes) => {
    for (const change of changes) {
      if (change.type === 'childList') change.addedNodes.forEach((node) => node.isConnected && all(node));
      else if (change.type === 'characterData') all(change.target);
      else if (!change.target.closest(BESIDE)) attributes(change.target);
    }
    for (const element of moved.keys()) if (!element.isConnected) moved.delete(element);
    watch.takeRecords(); // what was just put there
  });

  const SEEN = {childList: true, subtree: true, characterData: true, attributes: true, attributeFilter: ATTRIBUTES};
  let spoken = 'en';
  const speak = () => {
    const language = document.documentElement.lang.split('-')[0];
    if (language === spoken) return;
    const before = spoken;
    spoken = 'en';
    watch.disconnect();
    if (before !== 'en') back();
    [exact, patterns, known] = [new Map(), [], new Map()];
    const table = window.gradio_config?.i18n_translations?.[language];
    spoken = table ? language : 'en';
    if (!table) return;
    read(table);
    all(document.body);
    watch.observe(document.body, SEEN);
  };

  document.addEventListener('DOMContentLoaded', () => {
    // Gradio says there which language it speaks.
    new MutationObserver(speak).observe(document.documentElement, {attributeFilter: ['lang']});
    speak();
  });

  document.addEventListener('click', async (event) => {
    const language = event.target.closest?.('[data-language]')?.dataset.language;
    if (!language) return;
    kept(language);
    const core = performance.getEntriesByType('resource').find(({name}) => /[/]core-[^/]*[.]js$/.test(name));
    (await import(core.name)).changeLocale(language); // Gradio's own words, and `lang`, by which ours follow
  });
})();
