"""The style sheet of the report: one page for light, dark and paper, from 320 pixels up."""

STYLE = """
:root { color-scheme: light dark;
  --paper: #fffff8; --ink: #1b1b1b; --faint: #66665f; --rule: #e4e3da; --soft: #f4f3ea;
  --main: #1f5f9e; --other: #b4531a; --warn: #9a6a00; --bad: #a8201a; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #151513; --ink: #e6e4dc; --faint: #9b998f; --rule: #34332e; --soft: #1f1e1b;
  --main: #7db4ec; --other: #f0a06a; --warn: #e0b04a; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 28px 24px 60px; max-width: 1200px; background: var(--paper); color: var(--ink);
  font: 16px/1.5 Charter, "Bitstream Charter", "Iowan Old Style", Palatino, "Palatino Linotype", Georgia, serif;
  font-variant-numeric: lining-nums tabular-nums; overflow-wrap: anywhere; }
h1 { font-size: 27px; line-height: 1.2; font-weight: 600; margin: 0; }
h2 { font-size: 19px; font-weight: 600; margin: 44px 0 10px; }
h3 { font-size: 16px; font-weight: 400; font-style: italic; margin: 22px 0 6px; }
.about { color: var(--faint); margin: 4px 0 22px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 5px 22px; margin: 0; max-width: 900px; }
dt { color: var(--faint); } dd { margin: 0; grid-column: 2; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); gap: 26px 28px;
  margin-top: 34px; }
figure { margin: 0; min-width: 0; break-inside: avoid; }
figcaption { color: var(--faint); font-size: 14px; line-height: 1.4; }
figcaption b { color: var(--ink); font-weight: 600; font-size: 15px; }
.legend { float: right; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font: 11px system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; fill: var(--ink);
  font-variant-numeric: tabular-nums; }
svg .tick, svg text.level { fill: var(--faint); }
svg text.level, svg .end { paint-order: stroke; stroke: var(--paper); stroke-width: 3px; stroke-linejoin: round; }
svg path, svg line { fill: none; stroke-linecap: round; stroke-linejoin: round; }
.grid { stroke: var(--rule); stroke-width: 1; }
.axis { stroke: var(--faint); stroke-width: 1; }
line.level { stroke: var(--faint); stroke-width: 1; stroke-dasharray: 2 3; }
path.main { stroke: var(--main); stroke-width: 1.6; }
path.raw { stroke: var(--main); stroke-width: 1; opacity: .28; }
path.dots { stroke: var(--other); stroke-width: 1.3; }
svg circle.dots { fill: var(--other); } svg circle.main, svg circle.raw { fill: var(--main); }
svg path.area { fill: var(--other); opacity: .55; }
svg .end { font-weight: 600; } svg .end.main { fill: var(--main); }
svg .end.dots, svg .end.area { fill: var(--other); }
line.resume { stroke: var(--faint); stroke-width: 1; stroke-dasharray: 5 3; }
line.warning { stroke: var(--warn); stroke-width: 1; stroke-dasharray: 1 3; }
svg path.checkpoint { fill: var(--faint); }
.key { font-size: 13px; color: var(--faint); margin-left: 14px; white-space: nowrap; }
.key::before { content: ""; display: inline-block; width: 14px; margin-right: 5px; vertical-align: middle;
  border-top: 2px solid var(--main); }
.key.raw::before { opacity: .35; } .key.dots::before { border-color: var(--other); }
.key.area::before { border-top: 8px solid var(--other); opacity: .55; }
.key.resume::before { border-top: 2px dashed var(--faint); }
.key.warning::before { border-top: 2px dotted var(--warn); }
.key.checkpoint::before { width: 0; border: 4px solid transparent; border-top: 0; border-bottom: 6px solid var(--faint); }
.keys { margin: 14px 0 0; } .keys .key:first-child { margin-left: 0; }
.for-narrow { display: none; }
@media (min-width: 780px) { figure.wide { grid-column: span 2; } }
@media (max-width: 779px) { .for-wide { display: none; } .for-narrow { display: block; } .legend { float: none;
  display: block; margin-left: -14px; } }
.samples { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); gap: 26px 28px; }
.samples p { color: var(--faint); font-size: 14px; margin: 10px 0 3px; }
.samples p:first-child { margin-top: 0; }
pre { font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; margin: 0; padding: 9px 12px;
  background: var(--soft); white-space: pre-wrap; }
pre .prompt { color: var(--faint); }
.samples pre { padding: 6px 10px; font-size: 12.5px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; line-height: 1.45; }
th { text-align: left; font-weight: 400; color: var(--faint); border-bottom: 1px solid var(--faint); }
th, td { padding: 3px 18px 3px 0; vertical-align: top; } td { border-bottom: 1px solid var(--rule); }
th.n, td.n { text-align: right; white-space: nowrap; }
tr.warning td { color: var(--warn); } tr.error td { color: var(--bad); }
.note { color: var(--faint); font-size: 14px; }
footer { margin-top: 50px; color: var(--faint); font-size: 13px; border-top: 1px solid var(--rule); padding-top: 8px; }
@media (max-width: 520px) { body { padding: 20px 16px 40px; } dl { grid-template-columns: 1fr; gap: 0; }
  dd { grid-column: 1; margin-bottom: 9px; } }
@media print { :root { color-scheme: light; --paper: #fff; --ink: #000; --faint: #555; --rule: #ddd; --soft: #f6f6f6;
  --main: #1f5f9e; --other: #b4531a; --warn: #7a5400; --bad: #a8201a; }
  body { padding: 0; max-width: none; font-size: 11pt; } h2 { break-after: avoid; } tr { break-inside: avoid; } }
"""
