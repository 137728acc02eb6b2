"use strict";
// The searchable list of users. Ids and titles only ever become text, never markup.
(() => {
  const PAGE = 8;
  const KINDS = {popular: "popular now", new: "new in the catalogue", suggested: "suggested for this user"};
  const data = JSON.parse(document.getElementById("users-data").textContent);
  const field = document.getElementById("search");
  const status = document.getElementById("found");
  const list = document.getElementById("users-list");
  const more = document.getElementById("more");
  const plain = (text) => text.normalize("NFKD").replace(/\p{M}/gu, "").toLowerCase();
  const titles = data.titles.map(plain);
  const ids = data.users.map((user) => plain(user.id));
  let matching = [];
  let shown = 0;

  const element = (tag, className, ...children) => {
    const made = document.createElement(tag);
    if (className) made.className = className;
    made.append(...children);
    return made;
  };

  const reason = (entry) => {
    const words = [];
    if (entry.kind === "history") {
      words.push(`because of ${entry.because.map((place) => data.titles[place]).join(" and ")}`);
    } else {
      words.push(KINDS[entry.kind]);
    }
    if (entry.sources.length) {
      words.push(`found by ${entry.sources.map((place) => data.sources[place]).join(", ")}`);
    }
    const text = words.join("; ");
    return text[0].toUpperCase() + text.slice(1);
  };

  const recommendation = (entry, place) => {
    const title = element("span", "title", data.titles[entry.title]);
    if (entry.hit) title.append(" ", element("span", "hit", "liked later"));
    const score = element("span", "score", element("span", "hidden", "score "), entry.score.toFixed(2).replace("-", "−"));
    return element("li", "", element("span", "rank", `${place + 1}.`), title, score, element("span", "why", reason(entry)));
  };

  const card = (user, open) => {
    const hits = user.list.filter((entry) => entry.hit).length;
    const sum = `${hits} of ${user.list.length} liked later`;
    const summary = element("summary", "", element("span", "who", `User ${user.id}`), element("span", "sum", sum));
    const history = element("ul", "", ...user.history.map((place) => element("li", "", data.titles[place])));
    if (!user.history.length) history.append(element("li", "", "nothing yet"));
    const recommended = element("ol", "recommended", ...user.list.map(recommendation));
    const heading = element("h3", "", element("span", "", "Recommended"), element("span", "", "Score"));
    const beside = element("div", "beside", element("div", "", element("h3", "", "Liked before, the latest first"), history), element("div", "", heading, recommended));
    const made = element("details", "user", summary, beside);
    made.open = open;
    return made;
  };

  const show = () => {
    const next = matching.slice(shown, shown + PAGE);
    list.append(...next.map((user, i) => card(user, shown + i === 0)));
    shown += next.length;
    more.hidden = shown >= matching.length;
    more.textContent = `Show ${Math.min(PAGE, matching.length - shown)} more`;
  };

  const search = () => {
    const wanted = plain(field.value.trim());
    const of = new Set(titles.flatMap((title, place) => (title.includes(wanted) ? [place] : [])));
    matching = data.users.filter((user, i) => ids[i].includes(wanted)
      || user.history.some((place) => of.has(place)) || user.list.some((entry) => of.has(entry.title)));
    // Whose id it is comes before those whose titles have it.
    const rank = (user) => (plain(user.id) === wanted ? 0 : plain(user.id).includes(wanted) ? 1 : 2);
    if (wanted) matching.sort((a, b) => rank(a) - rank(b));
    list.replaceChildren();
    shown = 0;
    show();
    const n = matching.length.toLocaleString("en");
    status.textContent = wanted ? `${n} of ${data.users.length.toLocaleString("en")} users` : `${n} users`;
  };

  more.addEventListener("click", () => {
    const first = list.children.length;
    show();
    list.children[first].querySelector("summary").focus();
  });
  field.addEventListener("input", search);
  search();
})();
