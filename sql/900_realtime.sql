-- Creates what is missing of schema realtime: with each installation, because the installer may get the right to it later.

select relay.make_realtime(), relay.capture_messages();
