// Tells whoever looks at a page that the sign-in behind it is over, and why: ended in another tab, on another device,
// by an administrator or by its own timeouts. The text comes with the page, in the reader's language. A page of a
// sign-in that another one has followed in this browser is left: its forms would act for somebody else.
import { createClient } from "./coatcheck.js";

const client = createClient();
let sid;

function show({ reason }) {
  const prepared = document.getElementById("signed-out");
  if (prepared === null || document.querySelector(".signed-out") !== null) {
    return;
  }
  const notice = prepared.content.cloneNode(true);
  for (const text of notice.querySelectorAll("[data-reason]")) {
    text.hidden = text.dataset.reason !== reason;
  }
  const known = [...notice.querySelectorAll("[data-reason]")].some((text) => !text.hidden);
  const other = notice.querySelector("[data-other]");
  other.hidden = known || reason === null;
  // As a function: in a text `$&` and its like would mean something.
  other.textContent = other.textContent.replace("{reason}", () => reason);
  document.querySelector(".top nav").remove();
  document.querySelector("main").replaceChildren(notice);
  document.querySelector(".signed-out a").focus();
}

async function look() {
  const answer = await client.fetch("/api/me");
  if (!answer.ok) {
    return;
  }
  const { session } = await answer.json();
  if (sid !== undefined && sid !== session.sid) {
    location.replace("/");
  }
  sid = session.sid;
}

client.addEventListener("signedout", (event) => show(event.detail));
// Asked when the page is opened and whenever somebody comes back to it; between the two nobody is looking. No answer
// says nothing: nobody is signed out because a server or a network is away.
const lookQuietly = () => look().catch(() => {});
addEventListener("visibilitychange", () => document.visibilityState === "visible" && lookQuietly());
lookQuietly();
