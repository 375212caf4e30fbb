// Light or dark: the system's choice, or the other one. Runs before the page is drawn, so that it does not flash.

{
  const root = document.documentElement;
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : prefersDark.matches);

  try {
    root.dataset.theme = localStorage.getItem("llamajax.theme") ?? "";
  } catch {
    root.dataset.theme = ""; // the browser allows no storage
  }

  addEventListener("DOMContentLoaded", () => {
    const button = document.querySelector("#theme");
    const draw = () => (button.textContent = isDark() ? "Light theme" : "Dark theme");
    button.onclick = () => {
      const dark = !isDark();
      root.dataset.theme = dark === prefersDark.matches ? "" : dark ? "dark" : "light";
      draw();
      localStorage.setItem("llamajax.theme", root.dataset.theme);
    };
    prefersDark.onchange = draw;
    draw();
  });
}
