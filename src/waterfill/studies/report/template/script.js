"use strict";
// A tooltip for what is pointed at or focused, and arrow keys between the marks of a chart (one tab stop per chart).
(() => {
  const tip = document.getElementById("tip");
  let current = null;
  const place = () => {
    const mark = current;
    if (!mark) return;
    const box = mark.getBoundingClientRect(), own = tip.getBoundingClientRect();
    const left = Math.min(Math.max(12, box.left + box.width / 2 - own.width / 2), innerWidth - own.width - 12);
    const above = box.top - own.height - 10;
    tip.style.left = `${left}px`;
    tip.style.top = `${above > 8 ? above : Math.min(box.bottom + 10, innerHeight - own.height - 8)}px`;
  };
  const show = (mark) => {
    current = mark;
    tip.textContent = mark.dataset.tip;
    tip.hidden = false;
    place();
  };
  const hide = () => {
    current = null;
    tip.hidden = true;
  };
  const markOf = (event) => event.target.closest?.(".mark");
  for (const chart of document.querySelectorAll("svg.plot")) {
    const marks = [...chart.querySelectorAll(".mark")];
    if (!marks.length) continue;
    marks[0].tabIndex = 0;
    const go = (from, to) => {
      from.tabIndex = -1;
      to.tabIndex = 0;
      to.focus({ preventScroll: false });
    };
    chart.addEventListener("keydown", (event) => {
      const at = marks.indexOf(markOf(event));
      if (at < 0) return;
      const last = marks.length - 1;
      const to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: last }[event.key];
      if (event.key === "Escape") hide();
      if (to === undefined) return;
      event.preventDefault();
      go(marks[at], marks[Math.min(Math.max(to, 0), last)]);
    });
    // On the frame: an <svg> that listens for focus becomes a tab stop itself.
    chart.parentElement.addEventListener("focusin", (event) => markOf(event) && show(markOf(event)));
    chart.parentElement.addEventListener("focusout", hide);
    chart.addEventListener("pointerover", (event) => (markOf(event) ? show(markOf(event)) : hide()));
    chart.addEventListener("pointerleave", hide);
    chart.addEventListener("pointerdown", (event) => markOf(event) && show(markOf(event)));
  }
  addEventListener("scroll", place, { passive: true, capture: true });
  addEventListener("resize", place);
})();
