"""The style sheet of report.html: light and dark, wide and narrow, and printed."""

_LIGHT = """
  --page: #fbfaf8; --card: #ffffff; --ink: #1d2330; --soft: #5d6675; --line: #e2e1dc;
  --track: #eceae5; --heat: 47 111 202; --bad: 201 84 60; --heat-most: .42;
  --c0: #2f6fca; --c1: #d0661a; --c2: #14866d; --c3: #8a4fc4;
  --c4: #c23a6e; --c5: #77761f; --c6: #2792b8; --c7: #85583c;
"""
_DARK = """
  --page: #12151b; --card: #1a1f28; --ink: #e6e8ec; --soft: #9aa3b2; --line: #303743;
  --track: #262c37; --heat: 92 150 235; --bad: 226 116 92; --heat-most: .5;
  --c0: #6ea6f5; --c1: #f0954f; --c2: #45bf9f; --c3: #b78bec;
  --c4: #ee7ba5; --c5: #bdbb5a; --c6: #62c0e0; --c7: #c39473;
"""
_METHODS = "\n".join(f".m{i} {{ --c: var(--c{i}); }}" for i in range(8))

CSS = (
    f"""
:root {{ color-scheme: light dark; {_LIGHT} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}
{_METHODS}
"""
    + """
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2.5rem clamp(1rem, 3vw, 2rem) 4rem; max-width: 80rem;
  background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  overflow-wrap: break-word;
}
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 2.8rem 0 .4rem; }
h3 { font-size: 1rem; margin: 0 0 .7rem; }
p { margin: .4rem 0 .9rem; max-width: 74ch; }
.soft { color: var(--soft); }
.lead { font-size: 1.02rem; padding: .9rem 1.1rem; background: var(--card);
  border: 1px solid var(--line); border-left: 4px solid var(--c0); border-radius: 8px; }
.lead p { margin: 0; max-width: none; }
.findings { padding-left: 1.2rem; max-width: 84ch; }
.findings li { margin: .3rem 0; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin-top: .9rem; font-size: .92rem; }
a { color: var(--c0); text-underline-offset: .2em; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.3rem; margin: .8rem 0; padding: 0;
  list-style: none; font-size: .92rem; }
.swatch { display: inline-block; width: 26px; height: 10px; margin-right: .45em; }
.swatch line { stroke: var(--c); stroke-width: 5; }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 3px; margin-right: .5em;
  background: var(--c); }
.plots {
  display: grid; gap: 1rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr));
} figure { margin: 0; padding: 1rem 1.1rem; background: var(--card); border: 1px solid
var(--line);
  border-radius: 10px; }
figcaption { font-weight: 600; margin-bottom: .6rem; }
figcaption small { font-weight: 400; color: var(--soft); }
svg { display: block; width: 100%; max-width: 34rem; height: auto; }
svg text { font-size: 12.5px; fill: var(--soft); }
svg .group { fill: var(--ink); font-weight: 600; }
svg .value { fill: var(--ink); font-variant-numeric: tabular-nums; }
svg .end { text-anchor: end; }
svg .middle { text-anchor: middle; }
.track { fill: var(--track); }
.bar { fill: var(--c); }
.whisker { stroke: var(--ink); stroke-width: 1.4; fill: none; opacity: .8; }
.rule { stroke: var(--line); fill: none; }
polyline { fill: none; stroke: var(--c); stroke-linejoin: round; }
polyline.mean { stroke-width: 2.2; }
polyline.seed { stroke-width: 1; opacity: .35; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: .88rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .26rem .2rem; text-align: center; white-space: nowrap; }
thead th { color: var(--soft); font-weight: 600; border-bottom: 1px solid var(--line);
  vertical-align: bottom; }
.average { background: var(--page); }
thead .average { white-space: normal; min-width: 4.4rem; }
tbody th { text-align: left; font-weight: 500; }
.name { position: sticky; left: 0; background: var(--card); z-index: 1;
  max-width: 13rem; overflow: hidden; text-overflow: ellipsis; }
thead .name { text-align: left; }
.task th { padding: .9rem .7rem .2rem; font-weight: 700; color: var(--ink); }
.task span { position: sticky; left: .7rem; }
tbody tr:last-child > * { padding-bottom: .55rem; }
.name { padding-left: .7rem; }
td .cell { display: block; position: relative; padding: .14rem .62rem; border-radius: 6px;
  border: 1.5px solid transparent;
  background: rgb(var(--heat) / calc(var(--v) * var(--heat-most))); }
.lower td .cell { background: rgb(var(--bad) / calc(var(--v) * var(--heat-most))); }
td .cell.unseen { border: 1.5px dashed var(--soft); }
td .cell.far { border: 1.5px solid var(--soft); }
td .cell i { position: absolute; right: .14rem; top: -.05rem; font-style: normal; font-size: .72rem;
  color: var(--soft); }
td small { display: block; font-size: .7rem; line-height: 1.15; color: var(--soft); }
td b { font-weight: 750; }
td.none { color: var(--soft); }
.facts { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: .35rem 1.4rem;
  margin: .8rem 0; }
.facts dt { color: var(--soft); }
.facts dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
code { font: .88em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; white-space: pre-wrap;
} @media (max-width: 34rem) {
  body { padding-top: 1.4rem; }
  .name { max-width: 7.2rem; }
  .facts { grid-template-columns: 1fr; gap: 0 0; }
  .facts dd { margin-bottom: .6rem; }
}
@media print {
  body { max-width: none; padding: 0; }
  figure, .scroll { break-inside: avoid; }
}
"""
)
