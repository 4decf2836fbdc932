(function () {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const tools = document.querySelector(".tools"), plots = [...document.querySelectorAll(".plot")];
  const hasTouch = matchMedia("(pointer: coarse)").matches;  // there, dragging scrolls the page, and two fingers zoom
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
  const colors = Number(css("colors")), dashes = ["solid", "dash", "dot"], symbols = ["circle", "circle-open", "diamond-open"];
  const toColor = (color) => typeof color === "number" ? css("c" + color % colors) : color;
  const toStyle = (styles, color) => styles[Math.floor(color / colors) % styles.length];  // runs of one colour differ in it
  const literal = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;");  // plotly reads some HTML in labels
  const shorten = (text) => literal(text.length > 24 ? text.slice(0, 23) + "…" : text);
  const digits = new Intl.NumberFormat("en", { maximumSignificantDigits: 4 }).format;

  const curves = Object.values(charts).filter(({ rows }) => !rows.length).flatMap(({ series }) => series);
  const allSteps = curves.flatMap(({ x }) => [x[0], x[x.length - 1]]);
  const isNoisy = curves.some(({ kind, x, mean }) => kind === "line" && (mean || x.length > Number(tools.dataset.noisy)));
  const steps = { smoothing: isNoisy ? 0.02 : 0, isLog: false, first: Math.min(...allSteps), last: Math.max(...allSteps) };
  const stepsView = {}, smoothed = new Map();  // a view is what its plots show: a range of steps or time, on one of values too

  function describeBar(series, chart, i) {
    const start = series.start[i], end = start + series.x[i], unit = chart.unit.split(",")[0];
    const name = series.labels.length ? series.labels[i] + " " + series.name : series.name;
    const range = series.labels.length ? ` (${digits(start)} to ${digits(end)})` : "";
    return literal(`${chart.rows[series.y[i]]}: ${name}, ${digits(series.x[i])} ${unit}${range}`);
  }

  function toBars(series, chart, isHidden) {
    const { name, kind, x, y, labels, opacity } = series;
    const trace = { name: literal(name), x, y, visible: !isHidden };
    if (kind === "bar" && x.length > 500) return { ...trace, mode: "lines", hoverinfo: "text",  // one path, much faster
      x: x.flatMap((length, i) => [series.start[i], series.start[i] + length, null]), y: y.flatMap((row) => [row, row, null]),
      hovertext: x.flatMap((_, i) => Array(3).fill(describeBar(series, chart, i))),
      opacity, line: { color: toColor(series.color), width: 18 } };
    if (kind === "bar") return { ...trace, type: "bar", orientation: "h", base: series.start, width: 0.76, text: labels,
      textposition: "inside", insidetextanchor: "middle", textangle: 0, textfont: { size: 11, color: "#111" },
      hoverinfo: "text", hovertext: x.map((_, i) => describeBar(series, chart, i)),
      marker: { color: toColor(series.color), opacity, line: { color: css("page"), width: 1 } } };
    if (kind === "text") return { ...trace, mode: "text", text: labels.map((label) => " " + label),
      textposition: "middle right", textfont: { color: css("soft") }, cliponaxis: false, hoverinfo: "skip" };
    return { ...trace, mode: "markers", hoverinfo: "x+name",
      marker: { symbol: "line-ns", size: 22, line: { width: 2, color: css("ink") } } };
  }

  // The running mean over so many steps to either side, with triangular weights; at the start over as many as lie before.
  function smooth({ x, y, mean }, reach) {
    const [steps, values] = mean ?? [x, y];
    let first = 0;
    return [steps, values.map((value, i) => {
      const width = 1 + Math.min(reach, Math.abs(steps[i] - steps[0]));
      let sum = value, weights = 1;
      while (steps[first] <= steps[i] - width) first++;
      for (let j = first; steps[j] < steps[i] + width; j++) {
        const weight = j === i ? 0 : Math.max(0, 1 - Math.abs(steps[j] - steps[i]) / width);
        [sum, weights] = [sum + weight * values[j], weights + weight];
      }
      return Number((sum / weights).toPrecision(8));  // equal values have an equal mean
    })];
  }

  function toLines(plot, chart, range, visible) {
    const several = chart.series.filter(({ kind }) => kind === "line").length > 1;
    const front = plot.hiddenColors.has(plot.front) ? undefined : plot.front;
    const inside = ([x, y]) => {  // with a neighbour on each side, to which the line leads
      const isInside = (_, i) => (x[i + 1] ?? x[i]) >= range[0] && (x[i - 1] ?? x[i]) <= range[1];
      return { x: x.filter(isInside), y: y.filter(isInside) };
    };
    const faint = [], lines = [];  // faint are the values under a smooth curve
    for (const series of chart.series.filter(visible)) {
      const { kind, x, y, color } = series, isSmooth = steps.smoothing && kind === "line" && x.length > 1;
      const hasDots = kind === "dots" || x.length === 1;
      const isFront = front === String(color), opacity = front === undefined ? (several ? 0.85 : 1) : isFront ? 1 : 0.15;
      const trace = { name: literal(series.name), mode: !hasDots ? "lines" : several ? "markers" : "lines+markers",
        hovertemplate: "%{y:.5~g}", opacity, isFront, marker: { size: several ? 5 : 7, symbol: toStyle(symbols, color) },
        line: { color: toColor(color), width: hasDots ? 1 : several ? 1.5 : 1.75, dash: toStyle(dashes, color) } };
      if (isSmooth) faint.push({ ...trace, ...inside([x, y]), opacity: opacity * (several ? 0.25 : 0.4),
        line: { ...trace.line, width: 1, dash: "solid" }, ...(several ? { hoverinfo: "skip", hovertemplate: null } : {}) });
      if (isSmooth) [trace.name, trace.line.simplify] = [trace.name + (several ? "" : " (smoothed)"), false];
      lines.push({ ...trace, ...inside(isSmooth ? smoothed.get(series) : [x, y]) });
    }
    return [...faint, ...lines.sort((a, b) => a.isFront - b.isFront)];  // the last one is drawn over the others
  }

  const toAxis = (plot, value) => isLogSteps(plot) ? Math.log10(Math.max(value, 1)) : value;
  const toValue = (plot, value) => isLogSteps(plot) ? 10 ** value : value;
  const isLogSteps = (plot) => steps.isLog && plot.view === stepsView;

  function fullRange(plot) {  // on the axis
    const bars = charts[plot.dataset.chart].series.filter(({ start }) => start), isBar = bars.length > 0;
    const ends = bars.flatMap(({ x, start }) => x.map((length, i) => length + start[i]));
    const [low, high] = isBar ? [0, Math.max(...ends)] : [steps.first, steps.last].map((step) => toAxis(plot, step));
    const margin = 0.01 * (high - low || 1);
    return [isBar ? low : low - margin, high + margin];
  }

  function toLayout(plot, chart, isLog, range) {
    const hasRows = chart.rows.length > 0, largest = Math.max(...chart.series.map(({ y }) => Math.max(...y)));
    const font = { family: getComputedStyle(document.body).fontFamily, size: 12, color: css("soft") };
    const axis = { gridcolor: css("line"), linecolor: css("line"), zeroline: false, ticks: "", automargin: true,
      exponentformat: "SI" };
    const bottom = { ...axis, type: isLogSteps(plot) ? "log" : "linear", range, showgrid: hasRows, showspikes: !hasRows,
      unifiedhovertitle: { text: "step %{x:,}" }, spikethickness: 1, spikecolor: css("soft"), spikedash: "dot" };
    const rows = { ...axis, showgrid: false, fixedrange: true, range: [chart.rows.length - 0.4, -0.6],
      tickvals: chart.rows.map((_, i) => i), ticktext: chart.rows.map(shorten) };
    const values = { ...axis, type: isLog ? "log" : "linear", exponentformat: largest < 1 ? "e" : "SI",
      rangemode: chart.from_zero && !plot.view.range ? "tozero" : "normal" };
    if (plot.view.plot === plot) Object.assign(values, { range: plot.view.values, autorange: false });
    return {
      paper_bgcolor: "transparent", plot_bgcolor: hasRows ? css("fill") : "transparent", font, barmode: "overlay",
      uniformtext: { mode: "hide", minsize: 9 },  // labels that do not fit into their bars
      showlegend: false, dragmode: hasTouch ? false : "zoom",
      margin: { l: 44, r: chart.series.some(({ kind }) => kind === "text") ? 52 : 14, t: 12, b: 28 },
      hovermode: hasRows ? "closest" : "x unified",
      hoverlabel: { bgcolor: css("fill"), bordercolor: css("line"), font: { ...font, color: css("ink") } },
      xaxis: bottom, yaxis: hasRows ? rows : values,
      shapes: chart.marks.map(([step]) => ({ type: "line", x0: step, x1: step, yref: "paper", y0: 0, y1: 1,
        line: { color: css("soft"), width: 1, dash: "dot" } })),
    };
  }

  function draw(plot) {
    if (!plot.offsetParent) return;  // within closed details
    const chart = charts[plot.dataset.chart], figure = plot.closest("figure"), isLog = plot.isLog ?? chart.log;
    const hidden = plot.hiddenColors, isVisible = ({ color }) => !hidden.has(String(color)), hasRows = chart.rows.length > 0;
    const range = plot.view.range?.map((value) => toAxis(plot, value)) ?? fullRange(plot);
    plot.style.height = (hasRows ? (hasTouch ? 34 : 24) * chart.rows.length + 44 : figure.matches(".wide") ? 340 : 250) + "px";
    const traces = hasRows ? chart.series.map((series) => toBars(series, chart, !isVisible(series)))
      : toLines(plot, chart, range.map((value) => toValue(plot, value)), isVisible);
    Plotly.react(plot, traces, toLayout(plot, chart, isLog, range), { displayModeBar: false, responsive: true,
      doubleClick: false, showTips: false });
    if (!plot.isListening) listen(plot);
    plot.isListening = true;  // plotly drops what listened before its first drawing
    figure.querySelectorAll(".legend button").forEach((button) =>
      button.setAttribute("aria-pressed", !hidden.has(button.dataset.color)));
    figure.querySelector(".reset").hidden = !plot.view.range && plot.view.plot !== plot;
    const button = figure.querySelector(".log");
    if (!button || chart.series.some(({ y }) => Math.min(...y) <= 0)) return;
    button.hidden = false;
    button.setAttribute("aria-pressed", isLog);
    button.onclick = () => { plot.isLog = !isLog; plot.view.plot = undefined; draw(plot); };
  }

  const drawView = (view) => plots.filter((plot) => plot.view === view).forEach(draw);

  // Show part of the axis of steps or time on all plots of the view; null: all of it. With values, also part of the values.
  function zoom(plot, range, values, drawn = drawView) {
    Object.assign(plot.view, { range: range?.map((value) => toValue(plot, value)), values, plot: values && plot });
    drawn(plot.view);
  }

  // Show the part of the axis that starts here and is so wide, or what is left of it at an end.
  function move(plot, start, width, drawn) {
    const [low, high] = fullRange(plot), length = Math.max(width, (high - low) / 1000);
    const left = Math.max(low, Math.min(start, high - length));
    zoom(plot, length < high - low ? [left, left + length] : null, undefined, drawn);
  }

  function listen(plot) {
    const figure = plot.closest("figure"), getRange = () => plot._fullLayout.xaxis.range;
    plot.on("plotly_relayout", (change) => {
      const [range, values] = ["x", "y"].map((axis) => [0, 1].map((end) => change[`${axis}axis.range[${end}]`]))
        .map((ends) => ends[0] === undefined ? undefined : ends);
      if (range || values) zoom(plot, range ?? (plot.view.range && getRange()), values);
    });
    plot.on("plotly_doubleclick", () => zoom(plot, null));
    figure.querySelector(".reset").onclick = () => { zoom(plot, null); plot.focus({ preventScroll: true }); };

    plot.addEventListener("keydown", (event) => {
      const [low, high] = getRange(), width = high - low;
      const places = { "+": [low + width / 4, width / 2], "-": [low - width / 2, width * 2],
        ArrowLeft: [low - width / 4, width], ArrowRight: [low + width / 4, width], Escape: [low, Infinity] };
      if (!places[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      move(plot, ...places[event.key]);
    });

    let held = null;  // where the fingers are on the axis, as parts of its width, and the range then
    const hold = ({ touches }) => {
      const { left, width } = plot.querySelector(".nsewdrag").getBoundingClientRect(), [low, high] = getRange();
      const parts = [...touches].map(({ clientX }) => (clientX - left) / width).sort((a, b) => a - b);
      return { parts, low, width: high - low };
    };
    plot.addEventListener("touchstart", (event) => {
      held = hold(event);
      if (held.parts.length > 1) event.stopPropagation();  // plotly would take a second finger for a double click
    }, { capture: true, passive: true });
    plot.addEventListener("touchmove", (event) => {  // what was under a finger stays there
      const { parts } = hold(event), isPinch = parts.length === 2;
      if (parts.length !== held.parts.length || !(isPinch || parts.length === 1 && plot.view.range)) return;
      if (isPinch) event.preventDefault();
      const width = isPinch ? held.width * (held.parts[1] - held.parts[0]) / Math.max(0.02, parts[1] - parts[0]) : held.width;
      move(plot, held.low + held.width * held.parts[0] - width * parts[0], width, () => draw(plot));
    }, { passive: false });
    plot.ontouchend = plot.ontouchcancel = (event) => { held = hold(event); drawView(plot.view); };

    figure.querySelectorAll(".legend button").forEach((button) => {
      const color = button.dataset.color, hidden = plot.hiddenColors;
      const bring = (front) => { plot.front = front; draw(plot); };
      button.onclick = () => { hidden.delete(color) || hidden.add(color); draw(plot); };
      if (charts[plot.dataset.chart].rows.length) return;
      button.onpointerenter = () => bring(color);  // for a finger: while it rests there
      button.onpointerleave = button.onblur = () => bring(undefined);
      button.onfocus = () => button.matches(":focus-visible") && bring(color);
    });
  }

  function choose(change) {
    Object.assign(steps, change);
    const reach = Math.max(2, Math.round(steps.smoothing * (steps.last - steps.first)));
    curves.forEach((series) => smoothed.set(series, smooth(series, reach)));
    const stretch = Math.round(Math.max(...curves.map(({ mean }) => mean ? mean[0][1] - mean[0][0] : 0)));
    tools.querySelectorAll("[data-smoothing]").forEach((button) =>
      button.setAttribute("aria-pressed", Number(button.dataset.smoothing) === steps.smoothing));
    tools.querySelector("#log-steps").setAttribute("aria-pressed", steps.isLog);
    tools.querySelector("small").textContent = (hasTouch ? "Pinch to zoom." : "Drag to zoom, or press + and -.")
      + (steps.smoothing ? ` A smooth curve is the mean over ${reach} steps to either side, near ones most.` : "")
      + (stretch > 1 ? ` The page keeps the first, last, lowest and highest of each ${stretch} steps.` : "");
    drawView(stepsView);
  }

  for (const plot of plots) {
    plot.view = charts[plot.dataset.chart].rows.length ? {} : stepsView;
    plot.hiddenColors = new Set();
  }
  if (curves.length) {
    tools.hidden = false;
    tools.querySelectorAll("[data-smoothing]").forEach((button) =>
      button.onclick = () => choose({ smoothing: Number(button.dataset.smoothing) }));
    tools.querySelector("#log-steps").onclick = () => choose({ isLog: !steps.isLog });
    choose({});
  }
  const drawAll = () => plots.forEach(draw);
  drawAll();
  document.querySelectorAll("details").forEach((details) => details.addEventListener("toggle", drawAll));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
})();
