// Opens a page in a headless browser, as wide as a screen and as a phone; writes pictures of it.
//
//     npm i --no-save @sparticuz/chromium playwright-core
//     node benchmarks/browser.mjs quickstart.html
//
// Fails if the page asks for anything, scrolls sideways, or has a picture that does not show.

import path from "node:path";
import chromium from "@sparticuz/chromium";
import { chromium as playwright } from "playwright-core";

const page = path.resolve(process.argv[2]);
const browser = await playwright.launch({
  executablePath: await chromium.executablePath(),
  args: chromium.args,
});
let good = true;
for (const [name, width, height] of [["desktop", 1100, 900], ["phone", 390, 844]]) {
  const tab = await browser.newPage({ viewport: { width, height } });
  const asked = [];
  tab.on("request", (request) => {
    if (!/^(file|data):/.test(request.url())) asked.push(request.url());
  });
  await tab.goto(`file://${page}`);
  const seen = await tab.evaluate(() => ({
    width: document.documentElement.scrollWidth,
    broken: [...document.images].filter((image) => !image.naturalWidth).length,
    pictures: document.images.length,
  }));
  const picture = page.replace(/\.html$/, `_${name}.png`);
  await tab.screenshot({ path: picture, fullPage: true });
  console.log(picture, { ...seen, asked });
  good &&= seen.width <= width && !seen.broken && !asked.length;
}
await browser.close();
process.exit(good ? 0 : 1);
