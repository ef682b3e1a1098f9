// Three clients on one page. Each subscribes, reads the rows of now, and from then on changes what it shows by what it is told.

const config = await (await fetch('config.json')).json();

function element(tag, className = '', text = '') {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.textContent = text;
  return made;
}

// Sets the text and, unless it is the first one, lets the element glow for a moment.
function show(target, text) {
  const shown = String(text);
  if (target.textContent === shown) return;
  const first = target.textContent === '' || target.textContent === '–';
  target.textContent = shown;
  if (!first) glow(target);
}

function glow(target) {
  target.classList.remove('changed');
  void target.offsetWidth; // restarts the animation
  target.classList.add('changed');
}

function ago(moment) {
  const seconds = Math.max(0, Math.round((Date.now() - Date.parse(moment)) / 1000));
  if (seconds < 2) return 'now';
  if (seconds < 60) return `${seconds} s ago`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  return `${Math.floor(seconds / 3600)} h ago`;
}

function tell(time) {
  time.textContent = time.dataset.instead || ago(time.dateTime);
}

function setTime(item, moment, instead = '') {
  const time = item.querySelector('time');
  time.dateTime = moment;
  time.dataset.instead = instead;
  tell(time);
}

function section(body, title, className) {
  const made = element('section');
  const content = element('ul', className);
  made.append(element('h3', '', title), content, element('p', 'empty', 'Reading the rows'));
  body.append(made);
  return content;
}

// A list with one item a row: `make` builds an item, `fill` puts the row into it, `isBefore` compares two keys.
function list(container, keyOf, make, fill, isBefore = (one, other) => one < other) {
  const items = new Map();
  const put = (row) => {
    const key = keyOf(row);
    let item = items.get(key);
    if (!item) {
      item = make(row);
      item.key = key;
      items.set(key, item);
      container.insertBefore(item, [...container.children].find((other) => isBefore(key, other.key)) ?? null);
    }
    fill(item, row);
  };
  const remove = (key) => {
    items.get(key)?.remove();
    items.delete(key);
  };
  return {
    keyOf,
    change({ eventType, new: after, old: before }) {
      if (eventType === 'DELETE') remove(keyOf(before));
      else put(after);
    },
    // The rows of now, but for those that were told to have changed while they were read.
    rows(rows, changed) {
      const keys = new Set(rows.map(keyOf));
      [...items.keys()].filter((key) => !keys.has(key) && !changed.has(key)).forEach(remove);
      rows.filter((row) => !changed.has(keyOf(row))).forEach(put);
    },
  };
}

function agentItem(container) {
  return list(
    container,
    (row) => row.agent,
    (row) => {
      const item = element('li');
      item.append(element('span', 'name', row.agent), element('time'), element('span', 'switch'));
      return item;
    },
    (item, row) => {
      const control = item.querySelector('.switch');
      const state = row.enabled ? 'on' : 'off';
      const first = control.textContent === '';
      if (control.textContent !== state) {
        control.textContent = state;
        control.classList.toggle('on', row.enabled);
        if (!first) glow(item);
      }
      setTime(item, row.changed_at);
    },
  );
}

function personItem(container, self) {
  return list(
    container,
    (row) => row.username,
    (row) => {
      const item = element('li');
      const name = element('span', 'name', row.username === self ? `${row.username} (you)` : row.username);
      item.append(element('span', 'dot'), name, element('time'));
      return item;
    },
    (item, row) => {
      const state = row.is_online ? 'online' : 'offline';
      if (item.dataset.state && item.dataset.state !== state) glow(item);
      item.dataset.state = state;
      setTime(item, row.last_active_at, row.is_online ? 'online' : '');
    },
  );
}

function metrics(tiles, workers) {
  const labels = {
    total_documents: 'documents',
    files_completed: 'completed',
    files_waiting: 'waiting',
    files_failed: 'failed',
    users_online: 'online',
  };
  const values = {};
  const put = (row) => {
    for (const [column, label] of Object.entries(labels)) {
      if (!values[column]) {
        const tile = element('li');
        values[column] = element('b');
        tile.append(values[column], element('span', '', label));
        tiles.append(tile);
      }
      show(values[column], Number(row[column]).toLocaleString('en'));
    }
    for (const { name, state } of row.workers_real) {
      let item = workers.querySelector(`[data-key="${CSS.escape(name)}"]`);
      if (!item) {
        item = element('li');
        item.dataset.key = name;
        item.append(element('span', 'name', name), element('span', 'state'));
        workers.append(item);
      }
      item.dataset.state = state;
      show(item.querySelector('.state'), state);
    }
  };
  return {
    keyOf: (row) => row.id,
    change: ({ eventType, new: row }) => eventType === 'DELETE' || put(row),
    rows: (rows, changed) => changed.size || rows.forEach(put),
  };
}

function alerts(container) {
  const all = list(
    container,
    (row) => row.id,
    (row) => {
      const item = element('li', row.severity);
      item.append(element('span', 'severity', row.severity), element('span', 'message', row.message), element('time'));
      return item;
    },
    (item, row) => setTime(item, row.created_at),
    (one, other) => one > other,
  );
  return {
    ...all,
    change(change) {
      all.change(change);
      glow(container.firstChild);
    },
    rows: (rows, changed) => all.rows(rows.slice(-MOST_ALERTS), changed),
  };
}

function everyonesAgents(container) {
  const names = Object.fromEntries(config.people.map(({ id, name }) => [id, name]));
  return list(
    container,
    (row) => `${names[row.user_id] ?? row.user_id} ${row.agent}`,
    (row) => {
      const item = element('li');
      item.append(element('span', 'name', `${names[row.user_id] ?? '?'} · ${row.agent}`), element('span', 'state'));
      return item;
    },
    (item, row) => {
      item.dataset.state = row.enabled ? 'on' : 'off';
      show(item.querySelector('.state'), item.dataset.state);
    },
  );
}

// A page that stays open for days keeps as many as it reads.
const MOST_ALERTS = 200;
const medianOf = (numbers) => [...numbers].sort((a, b) => a - b)[Math.floor(numbers.length / 2)];

// Milliseconds since the change was written. Date.parse drops what is below a millisecond.
function age(commitTimestamp) {
  const below = Number(`0.${/\.\d{3}(\d+)/.exec(commitTimestamp)?.[1] ?? 0}`);
  return performance.timeOrigin + performance.now() - (Date.parse(commitTimestamp) + below);
}

async function open(person) {
  const panel = document.getElementById('panel').content.cloneNode(true).firstElementChild;
  panel.classList.add(person.admin ? 'admin' : 'user');
  panel.querySelector('.avatar').textContent = person.name[0];
  panel.querySelector('h2').textContent = person.name;
  panel.querySelector('.role').textContent = person.role;
  document.getElementById('panels').append(panel);

  const chip = panel.querySelector('.chip');
  const state = (name, why = '') => {
    chip.textContent = name;
    chip.dataset.state = name;
    chip.title = why;
  };
  state('connecting');

  const ages = [];
  let count = 0;
  let last = '';
  setInterval(() => { if (last) panel.querySelector('.last').textContent = `, last ${ago(last)}`; }, 500);
  const told = (change) => {
    ages.push(Math.max(0, age(change.commit_timestamp)));
    if (ages.length > 50) ages.shift();
    panel.querySelector('.latency').textContent = `${medianOf(ages).toFixed(1)} ms`;
    panel.querySelector('.count').textContent = (++count).toLocaleString('en');
    last = change.commit_timestamp;
  };

  const client = supabase.createClient(config.url, config.key, { accessToken: async () => person.token });
  const channel = client.channel(person.admin ? 'admin-metrics' : 'my-rows');
  const tables = [];
  const on = (event, table, shown) => {
    const changed = new Set();
    tables.push({ name: table, shown, changed });
    channel.on('postgres_changes', { event, schema: 'public', table }, (change) => {
      changed.add(shown.keyOf(change.eventType === 'DELETE' ? change.old : change.new));
      shown.change(change);
      told(change);
    });
  };
  // After the subscription, so that nothing can happen in between.
  const read = async ({ name, shown, changed }) => {
    changed.clear();
    const headers = { Authorization: `Bearer ${person.token}` };
    const answer = await fetch(`${config.url}/realtime/v1/changes?table=${name}`, { headers });
    if (!answer.ok) throw new Error(await answer.text());
    shown.rows((await answer.json()).rows, changed);
  };
  const readAll = () =>
    Promise.all(tables.map(read))
      .then(() => body.querySelectorAll('.empty').forEach((empty) => { empty.textContent = 'No rows'; }))
      .catch((error) => state('incomplete', String(error)));

  const body = panel.querySelector('.body');
  if (person.admin) {
    const tiles = section(body, 'Metrics', 'tiles');
    const workers = section(body, 'Workers', 'chips');
    on('*', 'admin_metrics_view', metrics(tiles, workers));
    on('INSERT', 'system_alerts', alerts(section(body, 'Alerts', 'alerts')));
    on('*', 'agent_access', everyonesAgents(section(body, 'Everyone’s agents', 'chips')));
  } else {
    on('*', 'agent_access', agentItem(section(body, 'My agents', 'rows')));
    on('*', 'user_status', personItem(section(body, 'People in my conversations', 'rows'), person.name));
  }
  channel.on('system', {}, ({ status, message }) => {
    if (message.startsWith('Stalled:')) return state('stalled', message);
    if (status === 'error' && !message.startsWith('Gap:')) return state('refused', message);
    state('live', message);
    if (message !== 'Feed resumed') readAll();
  });

  // First, so that the channel joins with this token and not with the anon key.
  await client.realtime.setAuth();
  channel.subscribe((status, error) => state(status === 'SUBSCRIBED' ? 'joined' : 'reconnecting', error?.message));
}

config.people.forEach(open);

const lines = document.querySelector('#try ol');
for (const { says, line } of config.try) {
  const item = element('li');
  const button = element('button', '', 'Copy');
  button.onclick = async () => {
    await navigator.clipboard.writeText(line);
    button.textContent = 'Copied';
    setTimeout(() => { button.textContent = 'Copy'; }, 1500);
  };
  item.append(element('p', '', says), element('pre', '', line), button);
  lines.append(item);
}
document.getElementById('try').hidden = config.try.length === 0;

setInterval(() => document.querySelectorAll('time').forEach(tell), 500);
