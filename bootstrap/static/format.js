// Numbers as people read them. Every function takes null for "not known" and answers with an en dash.

const UNKNOWN = "–";
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

export const count = (n) => (n === null ? UNKNOWN : n < 10000 ? whole.format(n) : compact.format(n));

export const loss = (x) => (x === null ? UNKNOWN : x < 100 ? x.toFixed(3) : compact.format(x));

export function bytes(n) {
  if (n === null) return UNKNOWN;
  const units = ["B", "kB", "MB", "GB", "TB", "PB"];
  let unit = 0;
  while (n >= 999.5 && unit < units.length - 1) {
    n /= 1000;
    unit += 1;
  }
  return `${unit === 0 || n >= 99.5 ? n.toFixed(0) : n.toFixed(1)} ${units[unit]}`;
}

export function seconds(s) {
  if (s === null) return UNKNOWN;
  if (s < 9.95) return `${s.toFixed(1)} s`;
  if (s < 99.5) return `${s.toFixed(0)} s`;
  if (s < 5400) return `${(s / 60).toFixed(0)} min`;
  if (s < 172800) return `${(s / 3600).toFixed(1)} h`;
  return `${(s / 86400).toFixed(0)} d`;
}

// All ids begin with the same letters, so the end is what tells them apart.
export const shortId = (peer) => `…${peer.slice(-8)}`;
