(async () => {
  const words = id => document.getElementById(id).textContent;
  // a closed part of the page would be missing on paper
  const folded = [...document.querySelectorAll("details:not([open])")];
  addEventListener("beforeprint", () => folded.forEach(one => one.open = true));
  addEventListener("afterprint", () => folded.forEach(one => one.open = false));
  try {
    const packed = Uint8Array.from(atob(words("plotly")), letter => letter.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const library = document.createElement("script");
    library.textContent = await new Response(stream).text();
    document.head.append(library);
    const options = { displayModeBar: false, responsive: true };
    for (const [id, figure] of Object.entries(JSON.parse(words("figures"))))
      await Plotly.newPlot(id, figure.data, figure.layout, options);
    // drawn for the screen: with a viewBox they are scaled to the paper (see @media print)
    const drawings = () => document.querySelectorAll(".main-svg");
    addEventListener("beforeprint", () => drawings().forEach(
      one => one.setAttribute("viewBox", `0 0 ${one.getAttribute("width")} ${one.getAttribute("height")}`)));
    addEventListener("afterprint", () => drawings().forEach(one => one.removeAttribute("viewBox")));
    document.body.dataset.drawn = "yes";
  } catch (problem) {
    document.getElementById("fallback").hidden = false;  // a browser too old for this
    document.body.dataset.drawn = "no: " + problem;
  }
})();
