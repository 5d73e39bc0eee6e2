// The page of the shop. The client keeps the access token in a variable of its own, renews it on use, once for all
// tabs, and says when the login is over; nothing here ever sees a token.
import { createClient } from "/coatcheck.js";

const WHY = {
  ended_by_user: "You signed this device out from another one.",
  session_limit: "You have signed in on many devices, and this one was used the longest ago.",
  logout: "You signed out in another tab.",
};

const at = (id) => document.getElementById(id);
const client = createClient();

function show(isSignedIn, notice = "") {
  at("sign-in").hidden = isSignedIn;
  at("shop").hidden = !isSignedIn;
  at("notice").textContent = notice;
  at("notice").hidden = notice === "";
  if (!isSignedIn) {
    // Whoever comes next does not see what the one before has bought.
    at("name").textContent = "";
    at("orders").replaceChildren();
    at("devices").replaceChildren();
  }
}

function lines(list, texts) {
  list.replaceChildren(
    ...texts.map((text) => {
      const line = document.createElement("li");
      line.textContent = text;
      return line;
    }),
  );
}

/** JSON of an answer; nothing when it was refused. If the login is over, the client has said so by then. */
async function ask(address, options) {
  try {
    const answer = await client.fetch(address, options);
    return answer.ok ? await answer.json() : undefined;
  } catch {
    show(client.isSignedIn, "The shop cannot be reached at the moment.");
    return undefined;
  }
}

async function load() {
  const mine = await ask("/api/orders");
  if (mine !== undefined) {
    show(true);
    at("name").textContent = mine.name;
    lines(at("orders"), mine.orders);
    await loadDevices();
  }
}

async function loadDevices() {
  const devices = await ask("/api/sessions");
  if (devices === undefined) {
    return;
  }
  lines(
    at("devices"),
    devices.map(({ device, network, since, current }) => {
      const time = new Date(since * 1000).toLocaleTimeString();
      return `${device}, ${network}, since ${time} ${current ? "(this one) " : ""}`;
    }),
  );
  devices.forEach(({ sid, current }, index) => {
    if (!current) {
      const button = document.createElement("button");
      button.textContent = "Sign it out";
      button.addEventListener("click", async () => {
        await ask(`/api/sessions/${encodeURIComponent(sid)}`, { method: "DELETE" });
        await loadDevices();
      });
      at("devices").children[index].append(button);
    }
  });
}

at("sign-in").addEventListener("submit", async (event) => {
  event.preventDefault();
  const form = event.currentTarget;
  try {
    await client.login(Object.fromEntries(new FormData(form)));
    form.reset();
  } catch (failure) {
    show(false, failure.code === "invalid_credentials" ? "Name or password are not right." : "Please try again.");
  }
});

for (const button of document.querySelectorAll(".buy")) {
  button.addEventListener("click", async () => {
    const body = JSON.stringify({ item: button.value });
    const done = await ask("/api/orders", { method: "POST", body, headers: { "content-type": "application/json" } });
    if (done !== undefined) {
      lines(at("orders"), done.orders);
    }
  });
}

at("sign-out").addEventListener("click", () => {
  client.logout().catch(() => show(false, "The shop was not reached: you are signed out on this page alone."));
});

client.addEventListener("signedin", load);
client.addEventListener("signedout", ({ detail: { code, reason, elsewhere } }) => {
  show(false, elsewhere ? (WHY[reason ?? code] ?? `This sign-in has ended: ${reason ?? code}.`) : "");
});

// The refresh cookie says whether somebody is signed in; the page that was here before has left nothing else.
try {
  if (!(await client.refresh())) {
    show(false, at("notice").textContent);
  }
} catch {
  show(false, "The shop cannot be reached at the moment.");
}
