"""How the grid of matrices looks and answers in the page: one element for all cells, with one listener a kind of event.

The component's value is the choice, as of `grid.state`; its property `layout` is what `grid.layout` says. A click
changes the choice in the browser at once and raises `edited`.
"""

TEMPLATE = """
<div class="matrix-bar">
  <span class="matrix-brush" role="radiogroup" aria-label="What a click does">
    <label><input type="radio" name="matrix-brush" value="toggle" checked> Adapt or leave out</label>
    <label><input type="radio" name="matrix-brush" value="rank"> Give rank</label>
    <input type="number" id="matrix-rank" min="1" step="1" value="4" aria-label="Rank to give">
  </span>
  <span class="matrix-steps">
    <button type="button" id="matrix-undo" disabled>Undo</button>
    <button type="button" id="matrix-reset">Reset</button>
  </span>
</div>
<div class="matrix-box" tabindex="-1"></div>
<div class="matrix-about" role="status"></div>
"""

JS = """
const box = () => element.querySelector('.matrix-box');
const find = (id) => element.querySelector('#' + id);
let cells = [], model = null, now = null, first = null, past = [], at = [0, 0], lines = [], boxes = [];

const mode = () => element.querySelector('[name=matrix-brush]:checked').value;
const make = (tag, names, words, roles = {}) => {
    const made = document.createElement(tag);
    made.className = names;
    if (words !== undefined) made.textContent = words;
    for (const [key, value] of Object.entries(roles)) made.setAttribute(key, value);
    return made;
};
const choice = (state) => JSON.stringify([state.on, state.own, state.some]);
const copy = (state) => JSON.parse(JSON.stringify(state));

// Columns are the names inside a layer, rows the layers of each stack; the rest stands below, one matrix a row.
const draw = () => {
    cells = [];
    lines = [];
    boxes = [];
    const told = props.layout ? JSON.parse(props.layout) : {model: null, cells: []};
    model = told.model;
    cells = told.cells.map(([path, stack, layer, column, out, inn, experts, whole], place) =>
        ({path, stack, layer, column, out, inn, experts, whole, place}));
    const columns = [...new Set(cells.filter(c => c.layer >= 0).map(c => c.column))];
    // A fused projection stands before its slices.
    const short = (name) => {
        const end = name.split('.').slice(-1)[0], slice = cells.find(c => c.column === name && c.whole >= 0);
        return slice ? name.split('.').slice(-2).join('.') : end;
    };
    const sheet = make('div', 'matrix-grid', undefined, {role: 'grid', 'aria-label': 'Layers and matrices',
        'aria-multiselectable': 'true'});
    sheet.style.setProperty('--columns', Math.max(1, columns.length));
    const head = make('div', 'matrix-line', undefined, {role: 'row'});
    const corner = make('button', 'matrix-head matrix-corner', 'layer', {role: 'columnheader', tabindex: -1,
        type: 'button', title: 'All of them', 'aria-label': 'all layers'});
    corner.takes = cells.filter(c => c.layer >= 0).map(c => c.place);
    head.append(corner);
    for (const name of columns) {
        const twice = columns.filter(other => short(other) === short(name)).length > 1;
        const there = make('button', 'matrix-head', undefined, {role: 'columnheader', tabindex: -1, type: 'button',
            title: name, 'aria-label': name});
        there.append(make('span', 'matrix-kind', name.slice(0, -short(name).length).replace(/[.]$/, '') || ' '),
            make('span', '', short(name)));
        there.takes = cells.filter(c => c.layer >= 0 && c.column === name).map(c => c.place);
        head.append(there);
    }
    sheet.append(head);
    if (columns.length) lines.push([...head.children]);
    const stacks = [...new Set(cells.filter(c => c.layer >= 0).map(c => c.stack))];
    for (const stack of stacks) {
        if (stacks.length > 1) sheet.append(make('div', 'matrix-part', stack));
        const rows = new Map();
        for (const cell of cells) {
            if (cell.layer < 0 || cell.stack !== stack) continue;
            if (!rows.has(cell.layer)) rows.set(cell.layer, new Map());
            rows.get(cell.layer).set(cell.column, cell);
        }
        for (const layer of [...rows.keys()].sort((a, b) => a - b)) {
            const row = make('div', 'matrix-line', undefined, {role: 'row'});
            const name = make('button', 'matrix-head matrix-layer', layer, {role: 'rowheader', tabindex: -1,
                type: 'button', 'aria-label': `${stack} ${layer}`});
            name.takes = [...rows.get(layer).values()].map(c => c.place);
            row.append(name);
            for (const column of columns) {
                const cell = rows.get(layer).get(column);
                row.append(cell ? cellOf(cell) : make('span', 'matrix-none', undefined, {role: 'gridcell'}));
            }
            sheet.append(row);
            lines.push([...row.children]);
        }
    }
    const outside = cells.filter(c => c.layer < 0);
    if (outside.length) sheet.append(make('div', 'matrix-part', 'In no layer'));
    for (const cell of outside) {
        const row = make('div', 'matrix-line', undefined, {role: 'row'});
        const drawn = cellOf(cell);
        drawn.classList.add('matrix-wide');
        row.append(drawn);
        sheet.append(row);
        lines.push([drawn]);
    }
    box().replaceChildren(sheet);
    at = [lines.length > 1 && columns.length ? 1 : 0, lines.length > 1 && columns.length ? 1 : 0];
    const start = lines[at[0]]?.[at[1]];
    if (start) start.tabIndex = 0;
};
const cellOf = (cell) => {
    const made = make('button', 'matrix-cell', undefined, {role: 'gridcell', tabindex: -1, type: 'button',
        'data-path': cell.path});
    made.place = cell.place;
    made.takes = [cell.place];
    boxes[cell.place] = made;
    return made;
};

const rank = (place) => now.own[place] ?? now.r;
const paint = () => {
    if (!now) return;
    for (const cell of cells) {
        const made = boxes[cell.place], letter = now.on[cell.place], own = now.own[cell.place];
        const isOn = letter !== '0';
        made.setAttribute('aria-selected', isOn);
        made.setAttribute('aria-label', `${cell.path}${isOn ? ', adapted, rank ' + rank(cell.place) : ''}`);
        made.dataset.on = letter;
        made.classList.toggle('matrix-own', isOn && own !== undefined);
        const words = (cell.layer < 0 ? cell.path : '') + (isOn && own !== undefined
            ? (cell.layer < 0 ? ' · ' : '') + own : '');
        if (made.textContent !== words) made.textContent = words;
    }
    find('matrix-undo').disabled = !past.length;
    about(lines[at[0]]?.[at[1]]);
};
const about = (made) => {
    const place = element.querySelector('.matrix-about'), number = (n) => n.toLocaleString('en');
    if (!made?.takes || !now) return;
    if (made.place === undefined) {
        const on = made.takes.filter(i => now.on[i] !== '0').length;
        const name = made.getAttribute('aria-label');
        place.textContent = `${name} · ${number(on)} of ${number(made.takes.length)} adapted`;
        return;
    }
    const cell = cells[made.place], letter = now.on[cell.place];
    const many = letter === 'p' ? now.some[cell.place].length : cell.experts || 1;
    const size = `${number(cell.out)} × ${number(cell.inn)}${cell.experts ? `, ${cell.experts} experts` : ''}`;
    const each = rank(cell.place) * (cell.out + cell.inn) + (now.dora ? cell.out : 0);
    place.textContent = `${cell.path} · ${size} · ` + (letter === '0' ? 'left out' :
        `r ${rank(cell.place)}${now.own[cell.place] ? ' of its own' : ''} · ${number(many * each)} trainable` +
        (letter === 'p' ? ` in ${many} experts` : ''));
};

const put = (next) => {  // an edit of the user's own
    past.push(copy(now));
    past = past.slice(-100);
    send(next);
};
const send = (next) => {
    now = next;
    paint();
    props.value = JSON.stringify(now);
    trigger('edited');
};
const with_ = (next, places, change) => {
    const on = [...next.on];
    for (const place of places) change(on, place);
    next.on = on.join('');
    return next;
};
const turnOff = (next, on, place) => { on[place] = '0'; delete next.own[place]; delete next.some[place]; };
const turnOn = (next, on, place) => {
    on[place] = '1';
    delete next.some[place];
    const whole = cells[place].whole;  // a fused projection is adapted whole or in slices
    if (whole >= 0) turnOff(next, on, whole);
    else for (const other of cells) if (other.whole === place) turnOff(next, on, other.place);
};
const act = (made) => {
    if (!made?.takes || !now) return;
    const next = copy(now);
    const many = made.takes.length > 1;
    // Of a whole row, fused projections are taken whole.
    const slices = made.takes.every(i => cells[i].whole >= 0);
    const places = many && !slices ? made.takes.filter(i => cells[i].whole < 0) : made.takes;
    if (mode() === 'rank') {
        const r = Math.max(1, Math.round(Number(find('matrix-rank').value) || 1));
        find('matrix-rank').value = r;
        const there = made.takes.filter(i => now.on[i] !== '0');
        const given = many && there.length ? there : places;
        const isThere = given.every(i => now.on[i] !== '0' && rank(i) === r);
        with_(next, given, (on, i) => {
            if (on[i] === '0') turnOn(next, on, i);
            if (isThere || r === now.r) delete next.own[i]; else next.own[i] = r;
        });
    } else {
        const isFull = places.every(i => now.on[i] === '1');
        if (isFull) with_(next, made.takes, (on, i) => turnOff(next, on, i));
        else with_(next, places, (on, i) => turnOn(next, on, i));
    }
    put(next);
};
const move = (row, column) => {
    const line = lines[Math.min(Math.max(row, 0), lines.length - 1)];
    const made = line?.[Math.min(Math.max(column, 0), line.length - 1)];
    if (!made?.takes) return;
    const old = lines[at[0]]?.[at[1]];
    if (old) old.tabIndex = -1;
    at = [lines.indexOf(line), line.indexOf(made)];
    made.tabIndex = 0;
    made.focus();
};
const step = (down, right) => {  // past places where a layer has no such matrix
    let [row, column] = at;
    do {
        row += down;
        column = Math.min(column + right, (lines[row]?.length ?? 0) - (right ? 0 : 1));
        const made = lines[row]?.[Math.max(column, 0)];
        if (!made || (right && (column < 0 || column >= lines[row].length))) return;
        if (made.takes) return move(row, Math.max(column, 0));
    } while (true);
};

element.addEventListener('click', (event) => {
    const made = event.target.closest('.matrix-cell, .matrix-head');
    if (made) {
        const row = lines.findIndex(line => line.includes(made));
        move(row, lines[row].indexOf(made));
        act(made);
    } else if (event.target.id === 'matrix-undo' && past.length)
        send({...past.pop(), r: now.r, dora: now.dora});
    else if (event.target.id === 'matrix-reset' && first && choice(first) !== choice(now))
        put({...copy(first), r: now.r, dora: now.dora});
});
element.addEventListener('focusin', (event) => {
    if (event.target.id === 'matrix-rank') element.querySelector('[value=rank]').checked = true;
    about(event.target.closest('.matrix-cell, .matrix-head'));
});
element.addEventListener('mouseover', (event) => about(event.target.closest('.matrix-cell, .matrix-head')));
element.addEventListener('keydown', (event) => {
    if (!event.target.closest('.matrix-box')) return;
    const steps = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[event.key];
    if (steps) step(...steps);
    else if (event.key === 'Home') move(event.ctrlKey ? 0 : at[0], 0);
    else if (event.key === 'End') move(event.ctrlKey ? lines.length - 1 : at[0], 1e6);
    else if (event.key.toLowerCase() === 'z' && (event.ctrlKey || event.metaKey)) find('matrix-undo').click();
    else return;  // space and Enter click a button
    event.preventDefault();
});
const take = () => {  // what the settings choose now
    const told = props.value ? JSON.parse(props.value) : null;
    if (!told || told.model !== model || told.on.length !== cells.length) return;
    if (now && choice(now) !== choice(told)) past.push(copy(now));
    if (!first) first = copy(told);
    now = told;
    paint();
};
const open = () => {
    const told = props.layout ? JSON.parse(props.layout).model : null;
    now = first = null;
    past = [];
    draw();
    take();
};
// Gradio tells of keys alone, not of what is pasted or taken back.
const boxesOfText = '#pattern, #setting-layers, #setting-exclude_modules, #setting-rank_pattern';
document.addEventListener('input', (event) => {
    if (event.target.closest?.(boxesOfText)) setTimeout(() => trigger('typed'), 50);
});
watch('layout', open);
watch('value', take);
open();
"""
"""Runs in the component; raises `edited` with the choice as its value, and `typed` when settings of it are written."""

CSS = """
.matrix-bar { display: flex; flex-wrap: wrap; gap: .4rem 1rem; justify-content: space-between; align-items: center;
  margin-bottom: .5rem; font-size: .85rem; }
.matrix-brush, .matrix-steps { display: flex; flex-wrap: wrap; gap: .3rem .8rem; align-items: center; }
.matrix-brush label { display: flex; gap: .35rem; align-items: center; cursor: pointer; }
.matrix-brush input[type=radio] { accent-color: var(--adapted); margin: 0; }
#matrix-rank { width: 4rem; padding: .1rem .4rem; border: 1px solid var(--input-border-color); border-radius: .3rem;
  background: var(--input-background-fill); color: var(--body-text-color); font-size: .85rem; }
.matrix-steps > button { border: 1px solid var(--border-color-primary); border-radius: .3rem; padding: .1rem .6rem;
  margin: 0; font-size: .85rem; font-weight: 400; line-height: 1.5; color: var(--body-text-color); background: none;
  cursor: pointer; }
.matrix-steps > button:hover:enabled { border-color: var(--adapted); }
.matrix-steps button:disabled { opacity: .45; cursor: default; }
.matrix-box { overflow: auto; max-height: 25rem; max-width: 100%; overscroll-behavior: contain; position: relative; }
.matrix-grid { display: grid; gap: 2px; width: 100%; min-width: max-content;
  grid-template-columns: auto repeat(var(--columns), minmax(3.4rem, 1fr)); font-variant-numeric: tabular-nums; }
.matrix-line { display: contents; }
.matrix-line > button { border: 0; padding: 0; margin: 0; cursor: pointer; font: inherit; color: inherit;
  background: none; border-radius: 3px; min-width: 0; }
.matrix-line > button:focus-visible { outline: 2px solid var(--body-text-color); outline-offset: -2px; z-index: 1; }
.matrix-line > .matrix-head { font-size: .75rem; font-weight: 600; padding: .15rem .35rem;
  background: var(--block-background-fill); }
.matrix-line > .matrix-head:hover { color: var(--adapted-text); }
.matrix-line:first-child > .matrix-head { position: sticky; top: 0; z-index: 2; line-height: 1.2; display: flex;
  flex-direction: column; align-items: center; justify-content: flex-end; padding-bottom: .3rem; }
.matrix-line > .matrix-layer, .matrix-line:first-child > .matrix-corner { position: sticky; left: 0; z-index: 1;
  text-align: right; align-items: flex-end; }
.matrix-line:first-child > .matrix-corner { z-index: 3; }
.matrix-line > :is(.matrix-layer, .matrix-corner), .matrix-kind { font-weight: 400;
  color: var(--body-text-color-subdued); }
.matrix-kind { font-size: .68rem; }
.matrix-line > .matrix-cell { min-height: 1.05rem; font-size: .72rem; line-height: 1.05rem; font-weight: 700;
  background: color-mix(in srgb, var(--base) 16%, var(--block-background-fill)); }
.matrix-line > .matrix-cell:hover { box-shadow: inset 0 0 0 2px var(--adapted); }
.matrix-line > .matrix-cell[data-on="1"] { background: var(--adapted); color: #fff; }
.matrix-line > .matrix-cell[data-on="p"] { color: var(--body-text-color); background: repeating-linear-gradient(
  135deg, var(--adapted) 0 4px, color-mix(in srgb, var(--base) 16%, var(--block-background-fill)) 4px 8px); }
.matrix-line > .matrix-own[data-on="1"] { background: #a34d10; }
.matrix-line > .matrix-wide { grid-column: 1 / -1; height: 1.45rem; line-height: 1.45rem; font-weight: 600;
  text-align: left; padding: 0 .5rem; }
.matrix-part { grid-column: 1 / -1; font-size: .75rem; color: var(--body-text-color-subdued); padding-top: .5rem; }
.matrix-about { min-height: 2.6em; margin-top: .5rem; font-size: .8rem; line-height: 1.3; overflow-wrap: anywhere;
  color: var(--body-text-color-subdued); font-variant-numeric: tabular-nums; }
"""
