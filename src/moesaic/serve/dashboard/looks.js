/** How an expert looks: a colour that colour-blind readers can tell apart, an underline style, and a letter.
 *
 * Eight colours and five styles have no common divisor, so the first 40 experts all differ in at least one of the two.
 * The letter differs for every expert. The colours themselves are in dashboard.css. */

const COLOURS = 8;
const STYLES = 5;

/** A, B, ..., Z, AA, AB, ... */
export function letter(expert) {
  let text = "";
  for (let n = expert + 1; n > 0; n = Math.floor((n - 1) / 26)) text = String.fromCharCode(65 + ((n - 1) % 26)) + text;
  return text;
}

export const lookOf = (expert) =>
  Number.isInteger(expert) && expert >= 0 ? `look colour-${expert % COLOURS} style-${expert % STYLES}` : "look none";

/** "C code", or "C" for an expert without a name. */
export const titleOf = (expert, names) => [letter(expert), names[expert]].filter(Boolean).join(" ");
