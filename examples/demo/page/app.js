// Three clients on one page. All rows come from postgres_changes; nothing is fetched beside them.

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

function section(body, title, className, empty) {
  const made = element('section');
  const content = element('ul', className);
  made.append(element('h3', '', title), content, element('p', 'empty', empty));
  body.append(made);
  return content;
}

// A list with one item a row, in the order of the rows' keys: `make` builds an item, `fill` puts the row into it.
function list(container, keyOf, make, fill) {
  const items = new Map();
  return ({ eventType, new: after, old: before }) => {
    const key = keyOf(eventType === 'DELETE' ? before : after);
    if (eventType === 'DELETE') {
      items.get(key)?.remove();
      items.delete(key);
      return;
    }
    let item = items.get(key);
    if (!item) {
      item = make(after);
      item.dataset.key = key;
      items.set(key, item);
      container.insertBefore(item, [...container.children].find((other) => other.dataset.key > key) ?? null);
    }
    fill(item, after);
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
  return ({ eventType, new: row }) => {
    if (eventType === 'DELETE') return;
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
}

function alerts(container) {
  return ({ new: row }) => {
    const item = element('li', row.severity);
    item.append(element('span', 'severity', row.severity), element('span', 'message', row.message), element('time'));
    setTime(item, row.created_at);
    container.prepend(item);
    glow(item);
    while (container.children.length > 200) container.lastChild.remove();
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
  const state = (name) => {
    chip.textContent = name;
    chip.dataset.state = name;
  };
  state('connecting');

  const ages = [];
  let count = 0;
  const counted = (handler) => (change) => {
    handler(change);
    ages.push(Math.max(0, age(change.commit_timestamp)));
    if (ages.length > 50) ages.shift();
    panel.querySelector('.latency').textContent = `${medianOf(ages).toFixed(1)} ms`;
    panel.querySelector('.count').textContent = (++count).toLocaleString('en');
  };

  const client = supabase.createClient(config.url, config.key, { accessToken: async () => person.token });
  const channel = client.channel(person.admin ? 'admin-metrics' : 'my-rows');
  const on = (event, table, handler) =>
    channel.on('postgres_changes', { event, schema: 'public', table }, counted(handler));

  const body = panel.querySelector('.body');
  if (person.admin) {
    const tiles = section(body, 'Metrics', 'tiles', 'Waiting for the next refresh of the view');
    const workers = section(body, 'Workers', 'chips', 'Waiting for the next refresh of the view');
    on('*', 'admin_metrics_view', metrics(tiles, workers));
    on('INSERT', 'system_alerts', alerts(section(body, 'Alerts', 'alerts', 'None since this page was opened')));
    on('*', 'agent_access', everyonesAgents(section(body, 'Everyone’s agents', 'chips', 'Waiting for the first change')));
  } else {
    on('*', 'agent_access', agentItem(section(body, 'My agents', 'rows', 'Waiting for the first change')));
    on('*', 'user_status', personItem(section(body, 'People in my conversations', 'rows', 'Waiting for the first change'), person.name));
  }

  // First, so that the channel joins with this token and not with the anon key.
  await client.realtime.setAuth();
  channel.subscribe((status) => state(status === 'SUBSCRIBED' ? 'live' : 'reconnecting'));
}

config.people.forEach(open);

const lines = document.querySelector('#try ol');
for (const { says, line } of config.try) {
  const item = element('li');
  item.append(element('p', '', says), element('pre', '', line));
  lines.append(item);
}
document.getElementById('try').hidden = config.try.length === 0;

setInterval(() => document.querySelectorAll('time').forEach(tell), 500);
