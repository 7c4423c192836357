// A page that stands alone, in the colours that its reader's system asks for: those of a notebook in light or dark.
function followScheme() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const follow = () => document.body.classList.toggle("dark", dark.matches); // charts look again when the body changes
  dark.addEventListener("change", follow);
  follow();
}

export { followScheme };
