// Pictures of the pages with the demo's data, for the documentation: into the folder that is named. With ALL, of every page, also on a
// phone and by night.
import { join } from "node:path";
import { launch, signIn, url } from "./browser.mjs";

const folder = process.argv[2];
const all = Boolean(process.env.ALL);
const looks = [["", "light", 1280], ["-dark", "dark", 1280], ["-phone", "light", 390]].slice(0, all ? 3 : 1);
const pages = [
  ["overview", ""], ["runs", "/runs"], ["sessions", "/sessions"], ["usage", "/usage?days=30"], ["apps", "/apps"],
  ["try", "/try"], ["run", "/runs", "tbody a"], ["session", "/sessions", "tbody a"], ["app", "/apps/demo-garden"],
].slice(0, all ? 9 : 5);

// Something goes on.
for (const what of ["Plan the meals of the week.", "Look for a train to the sea."]) {
  const headers = { authorization: `Bearer ${process.env.CLAWDFORGE_TOKEN}`, "content-type": "application/json", prefer: "respond-async" };
  await fetch(`${url}/run`, { method: "POST", headers, body: JSON.stringify({ prompt: `${what}\nstub: {"delay_ms": 20000}` }) });
}
const browser = await launch();
for (const [suffix, colorScheme, width] of looks) {
  const context = await browser.newContext({ colorScheme, viewport: { width, height: 860 }, timezoneId: "UTC", locale: "en-GB" });
  const page = await context.newPage();
  await signIn(page);
  for (const [name, path, click] of pages) {
    await page.goto(`${url}/ui${path}`);
    if (click) await page.locator(click).first().click();
    await page.waitForTimeout(300);
    await page.screenshot({ path: join(folder, `page-${name}${suffix}.png`), fullPage: all });
  }
  await context.close();
}
await browser.close();
