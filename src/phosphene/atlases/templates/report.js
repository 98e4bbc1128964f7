/* Makes the headings of the table of figures buttons that sort it; without it the table stays as it is. */
for (const table of document.querySelectorAll('table.sortable')) {
  const body = table.tBodies[0], headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    const button = document.createElement('button');
    button.textContent = heading.textContent;
    heading.replaceChildren(button);
    button.onclick = () => {
      const sign = heading.getAttribute('aria-sort') === 'ascending' ? -1 : 1;
      const text = (row) => row.cells[column].textContent.trim();
      const order = (a, b) => {
        const [first, second] = [text(a), text(b)];
        if (!first || !second) return (first ? 0 : 1) - (second ? 0 : 1);
        return sign * (column === 0 || column === 2 ? first.localeCompare(second) : first - second);
      };
      headings.forEach((cell) => cell.removeAttribute('aria-sort'));
      heading.setAttribute('aria-sort', sign > 0 ? 'ascending' : 'descending');
      body.replaceChildren(...[...body.rows].sort(order));
    };
  });
}
