"""How a report looks, and the little script that reads values under the pointer."""

CSS = """
:root { color-scheme: light dark; --page:#fff; --ink:#1c1e21; --soft:#667; --line:#dfe1e6; --fill:#f5f6f8; --warn:#8a5a00;
  --c0:#0072b2; --c1:#d55e00; --c2:#009e73; --c3:#cc79a7; --c4:#e69f00; --c5:#56b4e9; --c6:#b4b8c0 }
@media (prefers-color-scheme: dark) { :root { --page:#15171c; --ink:#e4e6ea; --soft:#9aa0ac; --line:#30343d; --fill:#1d2027;
  --warn:#e6b450; --c0:#56b4e9; --c1:#e69f00; --c2:#1fbf92; --c3:#dc95bd; --c4:#f0e442; --c5:#2a7fbf; --c6:#6b7180 } }
* { box-sizing: border-box }
html { -webkit-text-size-adjust: 100% }
body { margin:0; background:var(--page); color:var(--ink); font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif }
main { max-width:1080px; margin:0 auto; padding:40px 20px 80px }
h1 { font-size:2rem; line-height:1.2; margin:0 0 6px; letter-spacing:-.02em; overflow-wrap:anywhere }
h2 { font-size:1.3rem; margin:64px 0 8px; letter-spacing:-.01em; overflow-wrap:anywhere }
h3 { font-size:1rem; margin:32px 0 6px }
p, .said { max-width:68ch; margin:8px 0 }
.lead { color:var(--soft); font-size:1.05rem; max-width:78ch }
small, .note, .soft { color:var(--soft) }
.note { font-size:.85rem }
nav { margin:22px 0 0; display:flex; flex-wrap:wrap; gap:4px 18px; font-size:.92rem }
a { color:var(--c0); text-decoration:none } a:hover { text-decoration:underline }
.tiles { display:grid; grid-template-columns:repeat(4,1fr); gap:26px 20px; margin:34px 0 0; padding:0 }
.tiles div { min-width:0 } .tiles dt { color:var(--soft); font-size:.85rem }
.tiles dd { margin:0; font-size:1.75rem; line-height:1.25; font-variant-numeric:tabular-nums; letter-spacing:-.02em }
.tiles dd small { display:block; font-size:.8rem; letter-spacing:0; line-height:1.4 }
.missing { margin:30px 0 0; padding:12px 18px; border-left:3px solid var(--warn); background:var(--fill); max-width:78ch }
.missing ul { margin:2px 0; padding-left:1.1em }
.grids { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr)); gap:36px 40px; margin-top:20px }
figure { margin:0; min-width:0 } figcaption { margin-bottom:12px } figcaption b { font-weight:600 }
.wide { grid-column:1/-1 }
output { display:block; margin-top:6px; min-height:1.5em; font-size:.85rem; font-variant-numeric:tabular-nums }
.plot { position:relative; height:200px; margin:0 8px 26px 54px; touch-action:pan-y; cursor:crosshair }
.wide .plot { height:320px }
.plot svg { width:100%; height:100%; display:block; overflow:visible }
.plot path { fill:none; vector-effect:non-scaling-stroke; stroke-linejoin:round; stroke-linecap:round; stroke-width:1.75px }
.plot .grid { stroke:var(--line); stroke-width:1px } .plot .mark { stroke:var(--soft); stroke-width:1px; stroke-dasharray:3 4 }
.plot .faint { opacity:.38; stroke-width:1px } .plot .dots { stroke-width:7px } .plot .thin { stroke-width:1px; opacity:.7 }
.plot span { position:absolute; font-size:12px; line-height:1; color:var(--soft);
  font-variant-numeric:tabular-nums; white-space:nowrap }
.plot .y { right:100%; margin-right:8px; transform:translateY(-50%) }
.plot .x { top:100%; margin-top:8px; transform:translateX(-50%) }
.plot .hair { position:absolute; top:0; bottom:0; width:1px; background:var(--soft); pointer-events:none }
.legend { list-style:none; display:flex; flex-wrap:wrap; gap:2px 18px; margin:4px 0 0; padding:0;
  font-size:.85rem; color:var(--soft) }
.legend li { display:flex; align-items:center; gap:7px; min-width:0; overflow-wrap:anywhere } .legend i { flex:none }
.legend .line { width:18px; height:3px; border-radius:2px } .legend .dots { width:8px; height:8px; border-radius:50% }
.legend .box { width:13px; height:13px; border-radius:2px } .legend .target { width:2px; height:15px; background:var(--ink) }
.legend .marked { width:1px; height:14px; border-left:1px dashed var(--soft) }
.bars { margin-top:20px } .bars .legend { margin-top:14px }
.bar { display:grid; grid-template-columns:var(--names) 1fr 58px; gap:12px; align-items:center;
  margin:5px 0; font-size:.85rem }
.bar > span { font-variant-numeric:tabular-nums; overflow-wrap:anywhere } .bar > span:last-child { color:var(--soft) }
.bar > div { position:relative; display:flex; height:20px; background:var(--fill); border-radius:2px }
.bar i { display:block; height:100%; border-right:1px solid var(--page) }
.bar em { position:absolute; top:-3px; bottom:-3px; width:2px; background:var(--ink) }
.c0 { stroke:var(--c0) } .c1 { stroke:var(--c1) } .c2 { stroke:var(--c2) } .c3 { stroke:var(--c3) } .c4 { stroke:var(--c4) }
.c5 { stroke:var(--c5) } .c6 { stroke:var(--c6) }
i.c0 { background:var(--c0) } i.c1 { background:var(--c1) } i.c2 { background:var(--c2) } i.c3 { background:var(--c3) }
i.c4 { background:var(--c4) } i.c5 { background:var(--c5) } i.c6 { background:var(--c6) }
.scroll { overflow-x:auto; margin:14px 0; max-width:100% }
table { border-collapse:collapse; font-size:.9rem; font-variant-numeric:tabular-nums }
th, td { text-align:left; padding:6px 22px 6px 0; border-bottom:1px solid var(--line); vertical-align:top; white-space:nowrap }
td.long { white-space:normal; min-width:240px; overflow-wrap:anywhere } th { font-weight:600 }
.number { text-align:right }
pre { background:var(--fill); padding:16px 18px; overflow-x:auto; border-radius:4px;
  font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,monospace }
summary { cursor:pointer; color:var(--c0); margin:14px 0 } code { font:.9em ui-monospace,SFMono-Regular,Menlo,monospace }
footer { margin-top:72px; color:var(--soft); font-size:.85rem }
@media (max-width:600px) { .bar { gap:8px; font-size:.8rem; grid-template-columns:min(var(--names),32vw) 1fr 46px }
  main { padding:24px 16px 60px } h2 { margin-top:48px } .wide .plot { height:240px }
  .plot { margin-left:46px; margin-right:14px } .tiles { grid-template-columns:repeat(2,1fr) } }
@media print { .grids { display:block } figure { break-inside:avoid } }
"""

SCRIPT = """
document.querySelectorAll('.plot').forEach(function (plot) {
  var output = plot.parentNode.querySelector('output'), hair = null;
  var span = function (key) { return plot.getAttribute(key).split(' ').map(Number); };
  var xs = span('data-x'), ys = span('data-y'), log = plot.hasAttribute('data-log');
  var curves = null;
  var read = function () {
    return Array.prototype.map.call(plot.querySelectorAll('[data-name]'), function (path) {
      var points = path.getAttribute('d').match(/[-\\d.]+,[-\\d.]+/g).map(function (p) { return p.split(',').map(Number); });
      return { name: path.getAttribute('data-name'), points: points };
    });
  };
  var value = function (down) {
    var part = 1 - down / 1000;
    return log ? ys[0] * Math.pow(ys[1] / ys[0], part) : ys[0] + part * (ys[1] - ys[0]);
  };
  var step = function (across) { return Math.round(xs[0] + across / 1000 * (xs[1] - xs[0])).toLocaleString('en'); };
  var nearest = function (points, x) {
    var low = 0, high = points.length - 1;
    while (high - low > 1) { var middle = (low + high) >> 1; if (points[middle][0] < x) low = middle; else high = middle; }
    return Math.abs(points[low][0] - x) <= Math.abs(points[high][0] - x) ? points[low] : points[high];
  };
  var show = function (event) {
    var box = plot.getBoundingClientRect();
    var x = Math.max(0, Math.min(1, (event.clientX - box.left) / box.width)) * 1000;
    curves = curves || read();
    if (!hair) { hair = document.createElement('i'); hair.className = 'hair'; plot.appendChild(hair); }
    var found = curves.map(function (curve) { return nearest(curve.points, x); });
    var at = nearest(found.slice().sort(function (a, b) { return a[0] - b[0]; }), x)[0];
    hair.style.left = at / 10 + '%';
    output.textContent = 'step ' + step(at) + ': ' + found.map(function (point, i) {
      var where = Math.abs(point[0] - at) > 5 ? ' (at step ' + step(point[0]) + ')' : '';
      return curves[i].name + ' ' + value(point[1]).toLocaleString('en', { maximumSignificantDigits: 4 }) + where;
    }).join(', ');
  };
  var leave = function (event) {
    if (event.pointerType !== 'mouse') return;  // a finger that is lifted leaves the values there
    if (hair) { plot.removeChild(hair); hair = null; } output.textContent = '';
  };
  plot.addEventListener('pointermove', show);
  plot.addEventListener('pointerdown', show);
  plot.addEventListener('pointerleave', leave);
});
"""
