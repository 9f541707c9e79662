"use strict";
// A tooltip for what is pointed at or focused, and arrow keys between the marks of a chart (one tab stop per chart).
(() => {
  const tip = document.getElementById("tip");
  const show = (mark) => {
    tip.textContent = mark.dataset.tip;
    tip.hidden = false;
    const box = mark.getBoundingClientRect(), own = tip.getBoundingClientRect();
    const left = Math.min(Math.max(12, box.left + box.width / 2 - own.width / 2), innerWidth - own.width - 12);
    const above = box.top - own.height - 10;
    tip.style.left = `${left}px`;
    tip.style.top = `${above > 8 ? above : Math.min(box.bottom + 10, innerHeight - own.height - 8)}px`;
  };
  const hide = () => { tip.hidden = true; };
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
    chart.addEventListener("focusin", (event) => markOf(event) && show(markOf(event)));
    chart.addEventListener("focusout", hide);
    chart.addEventListener("pointerover", (event) => (markOf(event) ? show(markOf(event)) : hide()));
    chart.addEventListener("pointerleave", hide);
    chart.addEventListener("pointerdown", (event) => markOf(event) && show(markOf(event)));
  }
  addEventListener("scroll", hide, { passive: true });
})();
