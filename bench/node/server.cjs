// One express application that answers with its subject, or with 401: KIND STORE PORT SECRET ISSUER AUDIENCE.
"use strict";

const { createSecretKey } = require("node:crypto");
const express = require("express");

const [kind, store, port, secret, issuer, audience] = process.argv.slice(2);
const LIFETIME = 36_000;

async function subjectOf(app) {
  if (kind === "bare") return () => app.locals.subject;
  if (kind.startsWith("jsonwebtoken")) {
    const { verify } = require("jsonwebtoken");
    // A string is turned into a key at every request; a KeyObject is what its documentation lets one pass.
    const key = kind === "jsonwebtoken-key" ? createSecretKey(Buffer.from(secret)) : secret;
    return (request) => {
      const given = request.headers.authorization;
      if (given === undefined || !given.startsWith("Bearer ")) return undefined;
      try {
        return verify(given.slice(7), key, { algorithms: ["HS256"], issuer, audience }).sub;
      } catch {
        return undefined;
      }
    };
  }
  const session = require("express-session");
  const { RedisStore } = require("connect-redis");
  const client = require("redis").createClient({ url: store });
  await client.connect();
  app.set("trust proxy", 1);
  app.use(
    session({
      store: new RedisStore({ client, prefix: `${kind}:`, ttl: LIFETIME, disableTouch: kind === "session-untouched" }),
      secret,
      resave: false,
      saveUninitialized: false,
      cookie: { secure: true, maxAge: LIFETIME * 1000 },
    }),
  );
  app.get("/login/:subject", (request, response) => {
    request.session.user = request.params.subject;
    response.send("");
  });
  return (request) => request.session.user;
}

async function main() {
  const app = express();
  app.locals.subject = process.env.BENCH_SUBJECT;
  const who = await subjectOf(app);
  app.get("/me", (request, response) => {
    const found = who(request);
    if (found === undefined) response.status(401).end();
    else response.type("text/plain").send(found);
  });
  app.listen(Number(port), "127.0.0.1");
}

main();
