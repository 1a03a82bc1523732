/** Numbers as people read them, and quantiles of the engine's histograms. */

const NUMBER = new Intl.NumberFormat("en");

export const count = (value) => NUMBER.format(Math.round(value));

export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (Math.abs(value) >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${unit && Math.abs(value) < 100 ? value.toFixed(1) : Math.round(value)} ${units[unit]}`;
}

export function seconds(value) {
  if (value < 0.001) return `${(value * 1e6).toFixed(0)} µs`;
  if (value < 1) return `${(value * 1000).toFixed(value < 0.1 ? 1 : 0)} ms`;
  if (value < 100) return `${value.toFixed(1)} s`;
  const minutes = Math.floor(value / 60);
  return minutes < 100
    ? `${minutes} min ${Math.floor(value % 60)} s`
    : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

/** Never rounds to 100 % or 0 % what is not. */
export function percent(share) {
  const value = 100 * share;
  if (value > 0 && value < 0.1) return "< 0.1 %";
  if (value < 100 && value > 99.9) return "> 99.9 %";
  return `${Number.isInteger(value) ? value : value.toFixed(1)} %`;
}

export const rate = (value) => (value < 10 ? value.toFixed(1) : count(value));

export const total = (histogram) => histogram.counts.reduce((sum, n) => sum + n, 0);

/** The value that a share of all values does not exceed, linear within its bucket; Infinity beyond the last bound. */
export function quantile(histogram, share) {
  const wanted = share * total(histogram);
  let seen = 0;
  for (const [i, n] of histogram.counts.entries()) {
    if (n && seen + n >= wanted) {
      if (i >= histogram.bounds.length) return Infinity;
      const low = i ? histogram.bounds[i - 1] : 0;
      return low + ((wanted - seen) / n) * (histogram.bounds[i] - low);
    }
    seen += n;
  }
  return NaN;
}

export function quantileText(histogram, share) {
  const value = quantile(histogram, share);
  if (Number.isNaN(value)) return "–";
  return value === Infinity ? `> ${seconds(histogram.bounds.at(-1))}` : seconds(value);
}
