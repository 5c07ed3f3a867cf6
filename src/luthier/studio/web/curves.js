// Curves of what runs log, and their running mean.

/** [[step, value], ...] of one name in lines of metrics.jsonl. */
export function series(lines, name) {
  return lines.filter((line) => typeof line[name] === "number" && typeof line.step === "number").map((line) => [line.step, line[name]]);
}

/** The mean of what lies around each point, about a twentieth of the run: symmetric, so that no lag is drawn. */
export function smoothed(points) {
  const half = Math.floor(points.length / 40) || Math.min(1, Math.floor(points.length / 8));
  const sums = [0];
  for (const [, y] of points) sums.push(sums[sums.length - 1] + y);
  return points.map(([x], i) => {
    const reach = Math.min(half, i, points.length - 1 - i);
    return [x, (sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1)];
  });
}

/** Can these points be drawn on a logarithmic axis? */
export const positive = (...curves) => curves.every((points) => points.every(([, y]) => y > 0));
