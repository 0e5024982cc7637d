/** Light or dark: the theme that the user chose in this browser, before the page is drawn. The chat page shares it. */

{
    const THEME = "palm-rlhf.theme";
    const root = document.documentElement;

    const setTheme = (theme) => {
        if (theme) root.dataset.theme = theme;
        else delete root.dataset.theme;
    };

    /** Takes the other theme; that of the system is not kept, so that the page follows it again. */
    const toggle = () => {
        const ofSystem = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
        const next = (root.dataset.theme ?? ofSystem) === "dark" ? "light" : "dark";
        setTheme(next === ofSystem ? null : next);
        if (next === ofSystem) localStorage.removeItem(THEME);
        else localStorage.setItem(THEME, next);
    };

    setTheme(localStorage.getItem(THEME));
    addEventListener("storage", (event) => event.key === THEME && setTheme(event.newValue));
    document.addEventListener("click", (event) => event.target.closest(".theme-switch") && toggle());
    document.addEventListener("DOMContentLoaded", () => {
        for (const button of document.querySelectorAll(".theme-switch")) button.hidden = false;
    });
}
