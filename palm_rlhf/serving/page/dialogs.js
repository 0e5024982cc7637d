/** The dialogs of settings and of the API key, and the choice of light or dark. */

import { settings, save, key, keepBeyondTab, keepKey, outlivesTab } from "./store.js";
import { byId, drawKept } from "./view.js";

const THEME = "palm-rlhf.theme";
const systemIsDark = matchMedia("(prefers-color-scheme: dark)");
const form = byId("settings").querySelector("form");
const { model, system, temperature, topP, maxTokens, stop, seed, keep, shown, shownTopP } = form.elements;

/** Opens the settings, which apply while they are typed. */
export function openSettings() {
    system.value = settings.system;
    temperature.value = settings.temperature;
    shown.value = settings.temperature;
    topP.value = shownTopP.value = settings.topP;
    maxTokens.value = settings.maxTokens ?? "";
    stop.value = settings.stop;
    seed.value = settings.seed ?? "";
    keep.checked = outlivesTab();
    byId("forget-key").hidden = key() === null;
    byId("settings").showModal();
}

function takeSettings() {
    settings.model = model.value || null;
    settings.system = system.value;
    settings.temperature = temperature.valueAsNumber;
    shown.value = settings.temperature;
    settings.topP = topP.valueAsNumber;
    shownTopP.value = settings.topP;
    settings.stop = stop.value;
    if (seed.validity.valid) settings.seed = seed.value ? seed.valueAsNumber : null;
    if (maxTokens.validity.valid) settings.maxTokens = maxTokens.value ? maxTokens.valueAsNumber : null;
    byId("model").textContent = model.value;
    if (keep.checked !== outlivesTab()) keepBeyondTab(keep.checked);
    save();
    drawKept();
}

function forgetKey() {
    keepKey(null);
    byId("forget-key").hidden = true;
}

/** Runs a function that may need a key, and asks for a key as long as the server refuses the one it gets. */
export async function withKey(action) {
    for (;;) {
        try {
            return await action(key());
        } catch (error) {
            if (error.status !== 401 || !(await askForKey())) throw error;
        }
    }
}

/** Asks for a key; returns whether one was entered. */
function askForKey() {
    const dialog = byId("key-dialog");
    const field = dialog.querySelector("input");
    byId("key-refused").hidden = key() === null;
    if (!dialog.open) {
        dialog.returnValue = "";
        dialog.showModal();
    }
    return new Promise((resolve) => {
        const closed = () => {
            const isGiven = dialog.returnValue === "use";
            if (isGiven) keepKey(field.value.trim());
            field.value = "";
            resolve(isGiven);
        };
        dialog.addEventListener("close", closed, { once: true });
    });
}

/** Sets the theme of all tabs of this server; null is the theme of the system. */
function setTheme(theme) {
    if (theme) document.documentElement.dataset.theme = theme;
    else delete document.documentElement.dataset.theme;
    if (theme) localStorage.setItem(THEME, theme);
    else localStorage.removeItem(THEME);
}

function toggleTheme() {
    const ofSystem = systemIsDark.matches ? "dark" : "light";
    const next = (document.documentElement.dataset.theme ?? ofSystem) === "dark" ? "light" : "dark";
    setTheme(next === ofSystem ? null : next);
}

setTheme(localStorage.getItem(THEME));
form.addEventListener("input", takeSettings);
byId("cancel-key").addEventListener("click", () => byId("key-dialog").close());
byId("forget-key").addEventListener("click", forgetKey);
byId("settings-button").addEventListener("click", openSettings);
byId("theme-button").addEventListener("click", toggleTheme);
