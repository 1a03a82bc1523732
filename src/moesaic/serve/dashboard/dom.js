/** Small helpers around the document. All text goes in as text nodes: nothing that is shown is ever parsed as HTML. */

export const byId = (id) => document.getElementById(id);

/** A new element; `properties` are set as DOM properties, `attributes` as attributes. */
export function make(tag, properties = {}, children = [], attributes = {}) {
  const node = Object.assign(document.createElement(tag), properties);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const SVG = "http://www.w3.org/2000/svg";

export function makeSvg(tag, attributes) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

/** Writes only what changed, so that a page at rest costs no layout and disturbs no screen reader. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Arrow keys move within `box` from one item to the next: one Tab stop however many items it has.
 *
 * `next(item, key)` gives the item to go to, or undefined to stay. */
export function roam(box, selector, next) {
  box.addEventListener("keydown", (event) => {
    const item = event.target.closest(selector);
    if (!item || event.ctrlKey || event.altKey || event.metaKey) return;
    const to = next(item, event.key);
    if (!to) return;
    event.preventDefault();
    for (const old of box.querySelectorAll(`${selector}[tabindex="0"]`)) old.tabIndex = -1;
    to.tabIndex = 0;
    to.focus();
  });
}
