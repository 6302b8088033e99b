// What makes the pages live. Without it they show what there was when they were loaded.
"use strict";

// Times, in the reader's own zone.
const local = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" });
function localize(part) {
  for (const time of part.querySelectorAll("time[datetime]")) {
    time.title = time.dateTime;
    time.textContent = local.format(new Date(time.dateTime));
  }
}

// A part that the server sends anew whenever it changes. What was opened stays open, and the focus where it was.
function follow(part) {
  const source = new EventSource(part.dataset.live);
  source.addEventListener("html", (event) => {
    const opened = [...part.querySelectorAll("details")].map((details) => details.open);
    const focusable = () => [...part.querySelectorAll("a, button, summary, [tabindex]")];
    const focused = focusable().indexOf(document.activeElement);
    part.innerHTML = JSON.parse(event.data);
    part.querySelectorAll("details").forEach((details, at) => { details.open = opened[at] ?? false; });
    if (focused >= 0) focusable()[focused]?.focus();
    localize(part);
  });
}

// What an agent says, as it comes. At its end the page is taken anew, with the answer.
function listen(part) {
  const source = new EventSource(part.dataset.events);
  const append = (kind) => (event) => {
    const piece = JSON.parse(event.data);
    if (kind === "block") {
      part.insertAdjacentHTML("beforeend", piece);
    } else {
      if (!part.lastElementChild?.classList.contains(kind)) {
        const text = document.createElement("pre");
        text.className = kind;
        part.append(text);
      }
      part.lastElementChild.append(piece);
    }
  };
  for (const kind of ["text", "thinking", "block"]) source.addEventListener(kind, append(kind));
  source.addEventListener("end", () => {
    source.close();
    setTimeout(renew, 300);
  });
}

async function renew() {
  const answer = await fetch(location.href);
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  document.querySelector("main").replaceWith(page.querySelector("main"));
  enliven(document.querySelector("main"));
}

function copy(button) {
  button.hidden = false;
  button.addEventListener("click", () => {
    const text = document.getElementById(button.dataset.copy);
    text.select();
    // By the old way where the page has not come by TLS, as on a LAN.
    if (navigator.clipboard) navigator.clipboard.writeText(text.value);
    else document.execCommand("copy");
    button.textContent = "Copied";
  });
}

function enliven(part) {
  localize(part);
  // Of a plot that does not fit, what was last.
  for (const plot of part.querySelectorAll(".plot .scroll")) plot.scrollLeft = plot.scrollWidth;
  part.querySelectorAll("[data-live]").forEach(follow);
  part.querySelectorAll("[data-events]").forEach(listen);
  part.querySelectorAll("[data-copy]").forEach(copy);
}

document.querySelectorAll(".utc").forEach((note) => note.remove());
enliven(document.querySelector("main"));
