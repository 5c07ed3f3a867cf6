// What differs between two texts, word by word.

const ALIKE = 0.25; // of the longer text's words: where fewer are shared, both are shown as they are
const MOST = 600; // words of a text: the table of a comparison grows with their product

const words = (text) => text.match(/\s+|[\p{L}\p{N}_]+|[^\s\p{L}\p{N}_]/gu) ?? [];

/** [[part, in the first, in the second], ...] in order; null where the texts are too long to compare, or have too little in common. */
export function diff(before, after) {
  const a = words(before), b = words(after);
  if (a.length > MOST || b.length > MOST) return null;
  const common = table(a, b), parts = [];
  let shared = 0;
  const put = (text, first, second) => {
    const last = parts.at(-1);
    if (last && last[1] === first && last[2] === second) last[0] += text;
    else parts.push([text, first, second]);
  };
  let i = 0, j = 0;
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) {
      shared += /\S/.test(a[i]);
      put(a[i++], true, true);
      j++;
    } else if (j >= b.length || (i < a.length && common[i + 1][j] >= common[i][j + 1])) {
      put(a[i++], true, false);
    } else {
      put(b[j++], false, true);
    }
  }
  const longer = Math.max(...[a, b].map((list) => list.filter((word) => /\S/.test(word)).length));
  return shared >= ALIKE * longer ? parts : null;
}

/** [i][j]: how many words a from i on and b from j on have in common, in order. */
function table(a, b) {
  const lengths = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      lengths[i][j] = a[i] === b[j] ? lengths[i + 1][j + 1] + 1 : Math.max(lengths[i + 1][j], lengths[i][j + 1]);
    }
  }
  return lengths;
}
