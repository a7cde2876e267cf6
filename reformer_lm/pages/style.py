"""The look of all pages: one column on a phone, light or dark as the reader's system is."""

STYLE = """
:root {
  --page: #f9f9f7; --surface: #ffffff; --ink: #0b0b0b; --soft: #52514e; --faint: #898781; --line: #e1e0d9;
  --first: #2a78d6; --second: #d95f26; --best: #006300; --best-ground: #e9f5e6;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0d0d0d; --surface: #1a1a19; --ink: #ffffff; --soft: #c3c2b7; --faint: #898781; --line: #2c2c2a;
    --first: #3987e5; --second: #e8793f; --best: #5fc95f; --best-ground: #16301a;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", sans-serif;
}
main { max-width: 1180px; margin: 0 auto; padding: 16px; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 8px 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 32px 0 8px; }
h3 { font-size: 0.95rem; margin: 8px 0 4px; color: var(--soft); font-weight: 600; }
p { margin: 4px 0 8px; max-width: 75ch; }
header p { color: var(--soft); }
header strong { color: var(--ink); }
code { font: 0.85em/1.5 ui-monospace, Consolas, monospace; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 8px; margin: 16px 0; }
.tiles div { background: var(--surface); border: 1px solid var(--line); border-radius: 8px; padding: 10px 12px; }
dt { color: var(--soft); font-size: 0.8rem; }
dd { margin: 0; font-size: 1.3rem; font-weight: 600; line-height: 1.3; }
dd small { display: block; min-height: 1.3em; font-size: 0.78rem; font-weight: 400; color: var(--soft); }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 350px), 1fr)); gap: 12px; }
.figures.small { grid-template-columns: repeat(auto-fill, minmax(min(100%, 230px), 1fr)); }
figure { margin: 0; background: var(--surface); border: 1px solid var(--line); border-radius: 8px; padding: 10px; }
figcaption { font-size: 0.9rem; font-weight: 600; }
.figures.small figcaption { font-size: 0.82rem; font-weight: 400; }
.legend { display: flex; gap: 16px; margin: 2px 0; font-size: 0.8rem; color: var(--soft); }
.key { display: inline-block; width: 14px; height: 3px; border-radius: 2px; margin-right: 6px; vertical-align: middle; }
.key.s1 { background: var(--first); } .key.s2 { background: var(--second); }
svg { display: block; width: 100%; height: auto; }
svg text { font-size: 11px; fill: var(--faint); font-variant-numeric: tabular-nums; }
svg text.end { text-anchor: end; } svg text.middle { text-anchor: middle; }
svg text.strong { fill: var(--ink); font-weight: 600; paint-order: stroke; stroke: var(--surface); stroke-width: 3px; }
.grid { stroke: var(--line); stroke-width: 1; } .axis { stroke: var(--faint); stroke-width: 1; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.line.s1 { stroke: var(--first); } .line.s2 { stroke: var(--second); }
.band { stroke-width: 1; opacity: 0.3; }
.band.s1 { fill: var(--first); stroke: var(--first); } .band.s2 { fill: var(--second); stroke: var(--second); }
.dot { stroke: var(--surface); stroke-width: 1; } .dot.s1 { fill: var(--first); } .dot.s2 { fill: var(--second); }
.hit { fill: transparent; } .ring { fill: none; stroke: var(--ink); stroke-width: 1.5; }
.leader { stroke: var(--faint); stroke-width: 1; }
.bar { fill: var(--first); }
.scroll { overflow: auto; max-height: 26rem; }
table { border-collapse: collapse; font-size: 0.88rem; }
th, td { text-align: left; padding: 3px 12px 3px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th[scope="row"] { font-weight: 400; color: var(--soft); white-space: nowrap; }
td { overflow-wrap: anywhere; }
.numbers th, .numbers td { text-align: right; padding: 3px 18px 3px 6px; font-variant-numeric: tabular-nums; }
.numbers thead th { position: sticky; top: 0; background: var(--page); }
.best td { background: var(--best-ground); color: var(--best); font-weight: 600; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); gap: 8px 32px; }
details { background: var(--surface); border: 1px solid var(--line); border-radius: 8px; }
details { margin: 6px 0; padding: 6px 12px; }
summary { cursor: pointer; font-size: 0.9rem; color: var(--soft); }
.sample { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 1.05rem; line-height: 1.8; }
ol { padding-left: 1.4em; } li { margin: 6px 0; overflow-wrap: anywhere; }
"""
