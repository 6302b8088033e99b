// A headless Chromium of the machine's own, and the page of a server.
import { chromium } from "playwright-core";

export const url = process.env.CLAWDFORGE_URL;
export const admin = process.env.CLAWDFORGE_ADMIN_TOKEN;

export const launch = () =>
  chromium.launch({
    executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
    // It would ask its maker's servers.
    args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"],
  });

export async function signIn(page) {
  await page.goto(`${url}/ui`);
  await page.getByLabel("The operator's token").fill(admin);
  await page.getByRole("button", { name: "Sign in" }).click();
  await page.getByRole("heading", { name: "Overview" }).waitFor();
}
