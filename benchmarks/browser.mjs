// Opens pages in a headless browser, as wide as a screen and as a phone; writes pictures of them.
//
//     npm i --no-save @sparticuz/chromium playwright-core
//     node benchmarks/browser.mjs quickstart.html
//     node benchmarks/browser.mjs docs/_build/index.html docs/_build/guide/smote.html --dark --out shots
//
// --dark also takes the dark colours. Fails if a page asks for anything that is no file, scrolls
// sideways, has a picture that does not show, or text whose contrast is below that of WCAG AA.

import fs from "node:fs";
import path from "node:path";
import { parseArgs } from "node:util";
import chromium from "@sparticuz/chromium";
import { chromium as playwright } from "playwright-core";

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: { dark: { type: "boolean" }, out: { type: "string" } },
});

/** Runs in the page: its width, its pictures, and texts of too little contrast. */
function look() {
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    context.clearRect(0, 0, 1, 1);
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = context.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = (top, below) => top.slice(0, 3).map((c, i) => c * top[3] + below[i] * (1 - top[3]));
  const luminance = (colour) =>
    colour
      .map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4))
      .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) layers.push(rgba(getComputedStyle(e).backgroundColor));
    return layers.reverse().reduce((below, layer) => over(layer, below), [255, 255, 255]);
  };
  const faint = new Map();
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || !element.checkVisibility({ visibilityProperty: true })) continue;
    const box = element.getBoundingClientRect();
    if (box.width < 2 || box.height < 2) continue;
    const style = getComputedStyle(element);
    const ground = behind(element);
    const [a, b] = [luminance(over(rgba(style.color), ground)), luminance(ground)];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    if (ratio < (large ? 3 : 4.5)) {
      faint.set(`${element.tagName}.${element.className}`, `${ratio.toFixed(1)} ${texts.currentNode.data.trim().slice(0, 30)}`);
    }
  }
  return {
    width: document.documentElement.scrollWidth,
    broken: [...document.images].filter((image) => !image.naturalWidth).map((image) => image.src),
    pictures: document.images.length,
    faint: [...faint].slice(0, 8).map((pair) => pair.join(" ")),
  };
}

let good = true;
if (values.out) fs.mkdirSync(values.out, { recursive: true });
for (const page of positionals.map((name) => path.resolve(name))) {
  const browser = await playwright.launch({
    executablePath: await chromium.executablePath(),
    args: chromium.args,
  });
  for (const colorScheme of values.dark ? ["light", "dark"] : ["light"]) {
    for (const [name, width, height] of [["desktop", 1100, 900], ["phone", 390, 844]]) {
      const tab = await browser.newPage({ viewport: { width, height }, colorScheme });
      const asked = [];
      tab.on("request", (request) => {
        if (!/^(file|data):/.test(request.url())) asked.push(request.url());
      });
      await tab.goto(`file://${page}`);
      await tab.waitForTimeout(1000); // colours change slowly
      const seen = await tab.evaluate(look);
      const shade = colorScheme === "dark" ? "_dark" : "";
      const folder = values.out ?? path.dirname(page);
      const picture = path.join(folder, `${path.basename(page, ".html")}_${name}${shade}.png`);
      await tab.screenshot({ path: picture, fullPage: !values.dark });
      console.log(picture, { ...seen, asked });
      good &&= seen.width <= width && !seen.broken.length && !asked.length && !seen.faint.length;
    }
  }
  await browser.close();
}
process.exit(good ? 0 : 1);
