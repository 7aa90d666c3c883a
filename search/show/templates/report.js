"use strict";
document.body.classList.add("scripted");

// Values such as 60.0%, 4.215 M, 1,024 or text.
const scales = { k: 1e3, M: 1e6, G: 1e9, T: 1e12 };
const valueOf = (text) => {
  const found = /^\+?(-?[\d,.]+(?:e[-+]?\d+)?)\s*([kMGT]?)/.exec(text);
  return found ? parseFloat(found[1].replaceAll(",", "")) * (scales[found[2]] || 1) : null;
};

const compare = (a, b) => {
  const [x, y] = [valueOf(a), valueOf(b)];
  if (x === null || y === null) return x === y ? a.localeCompare(b) : x === null ? 1 : -1;
  return x - y;
};

for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    if (!head.textContent) return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const text = (row) => row.cells[column].textContent.trim();
      const rows = [...body.rows].sort((a, b) => (up ? 1 : -1) * compare(text(a), text(b)));
      body.append(...rows);
    });
  });
}

// A copy of the model's details below the picture; a model without them is named with its command.
const choose = (link) => {
  const address = link.getAttribute("href");
  const [prefix, number] = address.slice(1).split("trial-");
  const panel = document.getElementById(prefix + "chosen");
  const details = document.getElementById(prefix + "trial-" + number);
  panel.replaceChildren();
  if (details) {
    const copy = details.cloneNode(true);
    copy.removeAttribute("id");
    copy.open = true;
    panel.append(copy);
  } else {
    const title = document.createElement("p");
    const command = document.createElement("pre");
    title.textContent = link.querySelector("title").textContent;
    command.textContent = "secateur export " + panel.dataset.run + " " + number + " --to MODEL";
    panel.append(title, command);
  }
  panel.hidden = false;
  for (const point of document.querySelectorAll("a.hit")) {
    point.classList.toggle("on", point.getAttribute("href") === address);
  }
  const box = panel.getBoundingClientRect();
  if (box.top < 0 || box.top > innerHeight - 160) panel.scrollIntoView({ block: "center" });
};

for (const link of document.querySelectorAll("a[data-trial]")) {
  (link.closest("tr") || link).addEventListener("click", (event) => {
    event.preventDefault();
    choose(link);
  });
}
