// Follows the demonstration: puts what the server sends into the table, and presses the button without a new page.
"use strict";

const form = document.getElementById("end");
const away = document.getElementById("away");
const button = form.querySelector("button");

function show(view) {
  button.disabled = !view.can_end;
  document.getElementById("rounds").textContent = view.rounds;
  for (const row of view.rows) {
    const line = document.querySelector(`tr[data-node="${row.node}"]`);
    line.dataset.state = row.state;
    for (const cell of line.querySelectorAll("td")) cell.textContent = row[cell.dataset.key];
  }
}

function leave() {
  button.disabled = true;
  away.hidden = false;
}

const events = new EventSource("/events");
events.addEventListener("message", (event) => {
  away.hidden = true;
  show(JSON.parse(event.data));
});
events.addEventListener("error", () => {
  // Refused for good (too many pages) is another thing: the form still works.
  if (events.readyState === EventSource.CONNECTING) leave();
});
events.addEventListener("over", () => {
  events.close();
  leave();
});

form.addEventListener("submit", (event) => {
  event.preventDefault();
  button.disabled = true;
  fetch("/end", { method: "POST", redirect: "manual" }).catch(leave);
});
