"use strict";
// Tooltips, sorting and copying. Text of the run enters the page as text alone, never as markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const tip = document.getElementById("tip");

  const made = (tag, text, kind) => {
    const node = document.createElement(tag);
    node.textContent = text;
    if (kind) node.className = kind;
    return node;
  };

  // --- the tooltip ------------------------------------------------------------------------------

  const place = (box) => {
    tip.hidden = false;
    const size = tip.getBoundingClientRect();
    const wide = document.documentElement.clientWidth;
    const left = Math.min(Math.max(8, box.x - size.width / 2), wide - size.width - 8);
    const above = box.y - size.height - 14;
    tip.style.left = `${left}px`;
    tip.style.top = `${above > 8 ? above : box.y + 16}px`;
  };
  const pairs = (rows) => {
    const table = document.createElement("table");
    for (const row of rows) {
      const line = table.insertRow();
      for (const text of row) line.insertCell().textContent = text;
    }
    return table;
  };
  const hide = () => {
    tip.hidden = true;
    for (const node of document.querySelectorAll(".on")) node.classList.remove("on");
  };
  const rowOf = (key) => document.getElementById(`c${key}`);

  const describe = (key) => {
    const found = data.dots[key];
    const math = rowOf(key)?.querySelector("math");
    const parts = [made("b", found.head), made("span", found.kind, "kind")];
    if (math) {
      const room = made("div", "", "math");
      room.append(math.cloneNode(true));
      parts.push(room);
    } else if (found.formula) parts.push(made("code", found.formula));
    tip.replaceChildren(...parts, pairs(found.scores));
  };

  // --- scatter plots: the nearest point, in all panels ------------------------------------------

  const dots = new Map();
  const centre = (node) => {
    const box = node.lastElementChild.getBoundingClientRect();
    return { x: box.x + box.width / 2, y: box.y + box.height / 2 };
  };
  const show = (node) => {
    hide();
    for (const same of dots.get(node.dataset.key)) same.classList.add("on");
    describe(node.dataset.key);
    place(centre(node));
  };
  const go = (node) => {
    const row = rowOf(node.dataset.key);
    if (!row) return;
    hide();
    location.hash = row.id;
    row.scrollIntoView({ block: "center" });
  };

  for (const chart of document.querySelectorAll("svg.scatter")) {
    const points = [...chart.querySelectorAll(".dot")].map((node) => {
      const { e, f } = node.transform.baseVal[0].matrix;
      const title = node.querySelector("title");
      node.setAttribute("aria-label", title.textContent);
      title.remove(); // or the browser would show it over the tooltip
      const key = node.dataset.key;
      dots.set(key, [...(dots.get(key) ?? []), node]);
      return { node, x: e, y: f, ease: node.classList.contains("pale") ? 0 : 5 };
    });
    points.sort((a, b) => a.x - b.x || a.y - b.y);

    const nearest = (event) => {
      const inverse = chart.getScreenCTM().inverse();
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(inverse);
      let best = null;
      let least = 22;
      for (const point of points) {
        const far = Math.hypot(point.x - at.x, point.y - at.y) - point.ease;
        if (far < least) [least, best] = [far, point.node];
      }
      return best;
    };
    const follow = (event) => {
      const node = nearest(event);
      chart.classList.toggle("goes", Boolean(node && rowOf(node.dataset.key)));
      if (node) show(node);
      else hide();
    };
    chart.addEventListener("pointermove", follow);
    chart.addEventListener("pointerdown", follow);
    chart.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && hide());
    chart.addEventListener("click", (event) => {
      const node = event.pointerType === "mouse" && nearest(event);
      if (node) go(node);
    });
    chart.addEventListener("focusin", (event) => show(event.target));
    chart.addEventListener("focusout", hide);
    chart.addEventListener("keydown", (event) => {
      const here = points.findIndex((point) => point.node === event.target);
      const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
      if (event.key === "Enter") go(event.target);
      else if (event.key === "Escape") hide();
      else if (step && points[here + step]) {
        event.preventDefault();
        event.target.tabIndex = -1;
        const next = points[here + step].node;
        next.tabIndex = 0;
        next.focus();
      }
    });
  }

  // --- progress: a rule that reads off all lines ------------------------------------------------

  for (const chart of document.querySelectorAll("svg.curves")) {
    const rule = chart.querySelector(".rule");
    const [start, end, most] = ["start", "end", "most"].map((name) => Number(chart.dataset[name]));
    let count = most;

    const read = () => {
      hide();
      const x = start + ((end - start) * count) / most;
      rule.setAttribute("x1", x);
      rule.setAttribute("x2", x);
      rule.classList.add("on");
      const rows = data.lines
        .filter((line) => count <= line.values.length)
        .map((line) => [line.label, line.values[count - 1].toFixed(4)]);
      tip.replaceChildren(made("b", `after ${count} evaluations`), pairs(rows));
      const box = rule.getBoundingClientRect();
      place({ x: box.x, y: box.y + 8 });
    };
    const follow = (event) => {
      const inverse = chart.getScreenCTM().inverse();
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(inverse).x;
      const share = (at - start) / (end - start);
      count = Math.min(most, Math.max(1, Math.round(share * most)));
      read();
    };
    chart.addEventListener("pointermove", follow);
    chart.addEventListener("pointerdown", follow);
    chart.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && hide());
    chart.addEventListener("focus", () => chart.matches(":focus-visible") && read());
    chart.addEventListener("blur", hide);
    chart.addEventListener("keydown", (event) => {
      const moves = { ArrowRight: 1, ArrowLeft: -1, PageUp: 20, PageDown: -20, Home: -most, End: most };
      if (event.key === "Escape") hide();
      else if (event.key in moves) {
        event.preventDefault();
        count = Math.min(most, Math.max(1, count + moves[event.key]));
        read();
      }
    });
  }
  document.addEventListener("scroll", hide, { passive: true });

  // --- the table: sorted by a click on a head ---------------------------------------------------

  const table = document.querySelector("table.hall");
  if (table) {
    const heads = [...table.tHead.lastElementChild.cells];
    const body = table.tBodies[0];
    const order = document.getElementById("order");

    const compare = (a, b) => {
      const numbers = [Number(a), Number(b)];
      return numbers.some(Number.isNaN) ? a.localeCompare(b) : numbers[0] - numbers[1];
    };
    const sort = (column, down) => {
      const value = (row) => row.cells[column].dataset.v;
      const rows = [...body.rows];
      rows.sort((a, b) => {
        const [one, other] = [value(a), value(b)];
        if (one === "" || other === "") return (one === "") - (other === ""); // unknown: last
        return down ? compare(other, one) : compare(one, other);
      });
      body.append(...rows);
      for (const head of heads) head.removeAttribute("aria-sort");
      heads[column].setAttribute("aria-sort", down ? "descending" : "ascending");
      order.value = String(column);
    };
    heads.forEach((head, column) => {
      const first = head.dataset.first === "down";
      const button = head.querySelector("button");
      const name = button.getAttribute("aria-label") ?? button.textContent;
      order.append(new Option(name, String(column)));
      button.addEventListener("click", () => {
        const now = head.getAttribute("aria-sort");
        sort(column, now ? now === "ascending" : first);
      });
    });
    order.addEventListener("change", () => {
      const column = Number(order.value);
      sort(column, heads[column].dataset.first === "down");
    });
  }

  // --- copying ----------------------------------------------------------------------------------

  const copyByHand = (text) => {
    const room = document.createElement("textarea");
    room.value = text;
    room.style.position = "fixed";
    room.style.opacity = "0";
    document.body.append(room);
    room.select();
    const done = document.execCommand("copy");
    room.remove();
    if (!done) throw new Error("the browser does not let a page copy");
  };
  const copy = async (text) => {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      copyByHand(text);
    }
  };
  for (const button of document.querySelectorAll("button.copy")) {
    button.addEventListener("click", async () => {
      const say = (word) => { button.textContent = word; };
      try {
        await copy(button.dataset.text);
        say("copied");
      } catch {
        say("select it");
      }
      setTimeout(say, 1600, "copy");
    });
  }

  // --- lineages: a layer that the table has is a link to it -------------------------------------

  for (const link of document.querySelectorAll("a[data-to]")) {
    if (document.getElementById(link.dataset.to)) link.href = `#${link.dataset.to}`;
  }

  document.documentElement.dataset.ready = "yes";
})();
