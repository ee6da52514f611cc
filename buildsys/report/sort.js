// Sorts a table's rows by the column whose heading is pressed: numbers as numbers, what is no number last.
for (const table of document.querySelectorAll("table[data-sort]")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "sort";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((each) => each.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = (row) => row.cells[column].dataset.value;
      const numbers = head.classList.contains("num");
      const missing = (text) => numbers && !Number.isFinite(Number(text));
      const order = (a, b) => (numbers ? Number(a) - Number(b) : a < b ? -1 : a > b ? 1 : 0) * (down ? -1 : 1);
      const rows = [...body.rows].sort((a, b) => missing(value(a)) - missing(value(b)) || (missing(value(a)) ? 0 : order(value(a), value(b))));
      body.append(...rows);
    });
  });
}
