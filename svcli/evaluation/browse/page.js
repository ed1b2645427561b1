"use strict";
const cards = [...document.querySelectorAll("article")];
const chosen = (id) => document.getElementById(id).value;
const has = (names, name) => !name || JSON.parse(names).includes(name);

function filter() {
  let count = 0;
  for (const card of cards) {
    const group = chosen("group");
    card.hidden = Boolean(group && card.dataset.group !== group)
      || !has(card.dataset.wrong, chosen("wrong")) || !has(card.dataset.right, chosen("right"));
    count += !card.hidden;
  }
  document.getElementById("count").textContent = `${count} of ${cards.length}`;
}

document.getElementById("filter").hidden = false;
document.getElementById("filter").addEventListener("change", filter);
filter();
