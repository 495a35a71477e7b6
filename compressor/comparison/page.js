"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = (row) => row.cells[column].dataset.sort;
    const compared = (a, b) => value(a) === undefined && value(b) === undefined
      ? a.cells[column].textContent.localeCompare(b.cells[column].textContent)
      : Number(value(a)) - Number(value(b));
    const rows = [...table.tBodies[0].rows].sort((a, b) => (down ? -1 : 1) * compared(a, b));
    table.tBodies[0].append(...rows);
  }));
}
