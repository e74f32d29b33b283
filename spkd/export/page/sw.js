// Keeps the files of one export for use without a network. spkd writes the two constants.
const VERSION = "@version@";
const FILES = "@files@"; // names and digests
const PREFIX = `spkd:${registration.scope}:`;

addEventListener("install", (event) => {
  const requests = Object.entries(FILES).map(
    ([name, integrity]) => new Request(name, { cache: "reload", integrity }),
  );
  event.waitUntil(caches.open(PREFIX + VERSION).then((cache) => cache.addAll(requests)));
});

// A newer export acts when all tabs of the earlier one are closed, so that no page has files of both.
addEventListener("activate", (event) => {
  const isEarlier = (name) => name.startsWith(PREFIX) && name !== PREFIX + VERSION;
  event.waitUntil(
    caches.keys().then((names) => Promise.all(names.filter(isEarlier).map((name) => caches.delete(name)))),
  );
});

addEventListener("fetch", (event) => {
  if (event.request.method !== "GET") return;
  const kept = caches.open(PREFIX + VERSION).then((cache) => cache.match(event.request, { ignoreSearch: true }));
  event.respondWith(kept.then((response) => response ?? fetch(event.request)));
});
