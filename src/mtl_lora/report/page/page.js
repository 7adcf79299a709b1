// Sorts a table by the column whose heading is pressed; #sort=TABLE:COLUMN:DIRECTION does it when the page opens.
"use strict";
document.documentElement.classList.add("script");

function keyOf(row, column) {
  return row.cells[column].dataset.key;
}

function sortTable(table, column, direction) {
  const headings = Array.from(table.tHead.rows[0].cells);
  const numbers = headings[column].classList.contains("number");
  const sign = direction === "ascending" ? 1 : -1;
  const rows = Array.from(table.tBodies[0].rows);
  rows.sort((one, other) => {
    const [a, b] = [keyOf(one, column), keyOf(other, column)];
    // A cell without a value stands last, whichever way round.
    if (a === "" || b === "") return (a === "") - (b === "");
    return sign * (numbers ? Number(a) - Number(b) : a.localeCompare(b, "en"));
  });
  table.tBodies[0].append(...rows);
  headings.forEach((heading) => heading.removeAttribute("aria-sort"));
  headings[column].setAttribute("aria-sort", direction);
}

function pressed(table, column) {
  const heading = table.tHead.rows[0].cells[column];
  const first = heading.classList.contains("number") ? "descending" : "ascending";
  const second = first === "ascending" ? "descending" : "ascending";
  sortTable(table, column, heading.getAttribute("aria-sort") === first ? second : first);
}

for (const table of document.querySelectorAll("table.sortable")) {
  Array.from(table.tHead.rows[0].cells).forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    button.addEventListener("click", () => pressed(table, column));
    heading.append(button);
  });
}

const asked = /^#sort=([\w-]+):(\d+):(ascending|descending)$/.exec(location.hash);
if (asked) {
  const table = document.getElementById(asked[1]);
  if (table && table.matches("table.sortable") && Number(asked[2]) < table.tHead.rows[0].cells.length) {
    sortTable(table, Number(asked[2]), asked[3]);
    table.scrollIntoView();
  }
}

// What is folded away on the screen is printed.
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => (part.open = true)));
