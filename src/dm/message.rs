//! Builds and reads the messages of dm ioctls: `struct dm_ioctl` (include/uapi/linux/dm-ioctl.h) and what follows it,
//! as bytes.
//!
//! The kernel copies a message in and out, so the buffer needs no alignment.

use crate::base::DeviceNumber;

/// Bytes of `struct dm_ioctl`, the head of every dm message.
pub(crate) const HEAD_BYTES: usize = 312;

/// `DM_SUSPEND_FLAG`: asks for suspension; in an answer, the device is suspended.
pub(crate) const SUSPEND: u32 = 1 << 1;
/// `DM_STATUS_TABLE_FLAG`: asks for table lines instead of status lines.
pub(crate) const STATUS_TABLE: u32 = 1 << 4;
/// `DM_ACTIVE_PRESENT_FLAG`: in an answer, the device has a live table.
pub(crate) const ACTIVE_PRESENT: u32 = 1 << 5;
/// `DM_INACTIVE_PRESENT_FLAG`: in an answer, the device has a table that is loaded and not live.
pub(crate) const INACTIVE_PRESENT: u32 = 1 << 6;
/// `DM_BUFFER_FULL_FLAG`: in an answer, the buffer was too short for it.
pub(crate) const BUFFER_FULL: u32 = 1 << 8;
/// `DM_SKIP_LOCKFS_FLAG`: asks not to freeze a file system on the device.
pub(crate) const SKIP_LOCKFS: u32 = 1 << 10;
/// `DM_NOFLUSH_FLAG`: asks not to wait for queued I/O.
pub(crate) const NOFLUSH: u32 = 1 << 11;
/// `DM_QUERY_INACTIVE_TABLE_FLAG`: asks about the table that is loaded and not live.
pub(crate) const QUERY_INACTIVE_TABLE: u32 = 1 << 12;
/// `DM_UUID_FLAG`: asks a list for uuids too; in a rename, the text is a uuid.
pub(crate) const UUID: u32 = 1 << 14;
/// `DM_DEFERRED_REMOVE`: asks for removal at the last close; in an answer, the kernel will do that.
pub(crate) const DEFERRED_REMOVE: u32 = 1 << 17;

const DATA_START: usize = 16;
const TARGET_COUNT: usize = 20;
const OPEN_COUNT: usize = 24;
const FLAGS: usize = 28;
const EVENT_NR: usize = 32;
const DEV: usize = 40;
const NAME: usize = 48;
const UUID_FIELD: usize = 176;
const NAME_BYTES: usize = 128;
const UUID_BYTES: usize = 129;

/// The flags of an entry of `struct dm_name_list` that say whether a uuid follows (interface 4.45 and later).
const HAS_UUID: u32 = 1;
const HAS_NO_UUID: u32 = 2;

/// The offsets in `struct dm_target_spec` of the way to the next one, and of the target's name.
const NEXT: usize = 20;
const TARGET_TYPE: usize = 24;
const SPEC_BYTES: usize = 40;

/// The room of one target among several: a multiple of 8, as the kernel reads them where they lie.
pub(crate) const TARGET_ROOM: usize = SPEC_BYTES + 64;

/// A message in a buffer of at least [`HEAD_BYTES`].
#[derive(Debug)]
pub(crate) struct Message<B>(B);

/// A message that consists of its head alone.
pub(crate) type Head = Message<[u8; HEAD_BYTES]>;

/// The name, uuid or number by which a message names its device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Address<'a> {
    Name(&'a str),
    Uuid(&'a str),
    Number(DeviceNumber),
}

impl Head {
    pub(crate) fn to(address: Address<'_>) -> Self {
        let mut message = Self::new([0; HEAD_BYTES]);
        message.address(address);
        message
    }
}

impl<B: AsRef<[u8]> + AsMut<[u8]>> Message<B> {
    /// Makes a message of interface version 4.0.0, which every kernel takes, in a zeroed buffer.
    pub(crate) fn new(buffer: B) -> Self {
        let mut message = Self(buffer);
        message.0.as_mut().fill(0);
        message.put(0, 4);
        message.put(DATA_START, u32::try_from(HEAD_BYTES).unwrap_or(0));
        message
    }

    fn address(&mut self, address: Address<'_>) {
        match address {
            Address::Name(name) => self.put_text(NAME, NAME_BYTES, name),
            Address::Uuid(uuid) => self.put_text(UUID_FIELD, UUID_BYTES, uuid),
            Address::Number(number) => {
                self.0.as_mut()[DEV..DEV + 8].copy_from_slice(&number.to_kernel().to_ne_bytes())
            }
        }
    }

    pub(crate) fn with_address(mut self, address: Address<'_>) -> Self {
        self.address(address);
        self
    }

    pub(crate) fn with_flags(mut self, flags: u32) -> Self {
        self.put(FLAGS, flags);
        self
    }

    /// Sets the udev cookie, which shares its field with the event number.
    pub(crate) fn with_cookie(mut self, cookie: u32) -> Self {
        self.put(EVENT_NR, cookie);
        self
    }

    /// Sets the name, which some commands use for something other than a device.
    pub(crate) fn with_name(mut self, name: &str) -> Self {
        self.address(Address::Name(name));
        self
    }

    /// Writes a NUL-terminated text behind the head. The buffer must have room for at least the NUL.
    pub(crate) fn with_text(mut self, text: &str) -> Self {
        let room = self.0.as_ref().len() - HEAD_BYTES;
        self.put_text(HEAD_BYTES, room, text);
        self
    }

    /// Writes one target behind the head: `struct dm_target_spec` and its NUL-terminated parameters.
    pub(crate) fn with_target(mut self, start: u64, length: u64, kind: &str, params: &str) -> Self {
        self.put(TARGET_COUNT, 1);
        let room = self.0.as_ref().len() - HEAD_BYTES;
        self.put_target(HEAD_BYTES, room, [start, length], kind, params);
        self
    }

    /// Writes several targets behind the head, each in [`TARGET_ROOM`] bytes.
    pub(crate) fn with_targets(mut self, targets: &[([u64; 2], &str, &str)]) -> Self {
        self.put(TARGET_COUNT, u32::try_from(targets.len()).unwrap_or(0));
        for (nth, (place, kind, params)) in targets.iter().enumerate() {
            let at = HEAD_BYTES + nth * TARGET_ROOM;
            self.put_target(at, TARGET_ROOM, *place, kind, params);
            self.put(at + NEXT, u32::try_from(TARGET_ROOM).unwrap_or(0));
        }
        self
    }

    fn put_target(&mut self, at: usize, room: usize, place: [u64; 2], kind: &str, params: &str) {
        for (nth, sectors) in place.into_iter().enumerate() {
            let at = at + nth * 8;
            self.0.as_mut()[at..at + 8].copy_from_slice(&sectors.to_ne_bytes());
        }
        self.put_text(at + TARGET_TYPE, SPEC_BYTES - TARGET_TYPE, kind);
        self.put_text(at + SPEC_BYTES, room - SPEC_BYTES, params);
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        self.0.as_mut()
    }

    pub(crate) fn minor_version(&self) -> u32 {
        self.u32_at(4)
    }

    pub(crate) fn flags(&self) -> u32 {
        self.u32_at(FLAGS)
    }

    pub(crate) fn open_count(&self) -> u32 {
        self.u32_at(OPEN_COUNT)
    }

    pub(crate) fn number(&self) -> DeviceNumber {
        let bytes = self
            .0
            .as_ref()
            .get(DEV..DEV + 8)
            .and_then(|bytes| bytes.try_into().ok());
        DeviceNumber::from_kernel(bytes.map_or(0, u64::from_ne_bytes))
    }

    pub(crate) fn name(&self) -> String {
        text(&self.0.as_ref()[NAME..NAME + NAME_BYTES])
    }

    /// True if the device in the answer has that name; it does not allocate. The kernel writes the name into every
    /// answer about one device (`__find_device_hash_cell`, `drivers/md/dm-ioctl.c`).
    pub(crate) fn is_named(&self, name: &str) -> bool {
        let field = &self.0.as_ref()[NAME..NAME + NAME_BYTES];
        field.split(|byte| *byte == 0).next() == Some(name.as_bytes())
    }

    pub(crate) fn uuid(&self) -> String {
        text(&self.0.as_ref()[UUID_FIELD..UUID_FIELD + UUID_BYTES])
    }

    /// Returns the bytes that the kernel wrote behind the head.
    pub(crate) fn payload(&self) -> &[u8] {
        self.0
            .as_ref()
            .get(self.u32_at(DATA_START) as usize..)
            .unwrap_or_default()
    }

    /// How many targets the answer has.
    pub(crate) fn target_count(&self) -> u32 {
        self.u32_at(TARGET_COUNT)
    }

    fn u32_at(&self, at: usize) -> u32 {
        u32_at(self.0.as_ref(), at).unwrap_or(0)
    }

    fn put(&mut self, at: usize, value: u32) {
        self.0.as_mut()[at..at + 4].copy_from_slice(&value.to_ne_bytes());
    }

    fn put_text(&mut self, at: usize, room: usize, text: &str) {
        let kept = text.len().min(room - 1);
        self.0.as_mut()[at..at + kept].copy_from_slice(&text.as_bytes()[..kept]);
    }
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes
        .get(at..at.checked_add(4)?)?
        .try_into()
        .ok()
        .map(u32::from_ne_bytes)
}

/// Returns the text before the first NUL. Other programs' names may have any byte, so what is not UTF-8 is replaced.
fn text(field: &[u8]) -> String {
    let end = field
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(field.len());
    String::from_utf8_lossy(&field[..end]).into_owned()
}

/// Reads the version in the first `struct dm_target_versions` of an answer: a `next` word, then three of version.
pub(crate) fn target_version(payload: &[u8]) -> Option<[u32; 3]> {
    Some([
        u32_at(payload, 4)?,
        u32_at(payload, 8)?,
        u32_at(payload, 12)?,
    ])
}

/// Returns the first target's name and text, from an answer that has a `struct dm_target_spec` and a text for each
/// target (`retrieve_status`, `drivers/md/dm-ioctl.c`).
pub(crate) fn first_target(payload: &[u8]) -> Option<(&str, &str)> {
    let text = |field: &'_ [u8]| field.iter().position(|byte| *byte == 0);
    let kind = payload.get(TARGET_TYPE..SPEC_BYTES)?;
    let status = payload.get(SPEC_BYTES..)?;
    let kind = &kind[..text(kind)?];
    let status = &status[..text(status)?];
    let utf8 = |text| std::str::from_utf8(text).ok();
    Some((utf8(kind)?, utf8(status)?))
}

/// Returns owned copies of what [`first_target`] returns; `None` also for a device without a table.
pub(crate) fn first_line(payload: &[u8]) -> Option<(String, String)> {
    let line = first_target(payload).filter(|(kind, _)| !kind.is_empty());
    line.map(|(kind, text)| (kind.to_owned(), text.to_owned()))
}

/// Returns every target's name and text in an answer to `DM_TABLE_STATUS`. There, `next` counts from the first one
/// (`retrieve_status`).
pub(crate) fn lines(payload: &[u8], count: u32) -> Vec<(&str, &str)> {
    let mut lines = Vec::new();
    let mut at = 0;
    for _ in 0..count {
        let rest = payload.get(at..).unwrap_or_default();
        let (Some(line), Some(next)) = (first_target(rest), u32_at(rest, NEXT)) else {
            break;
        };
        lines.push(line);
        at = next as usize;
    }
    lines
}

/// A device in the answer to `DM_LIST_DEVICES`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Listed {
    pub(crate) name: String,
    /// The uuid: `None` where the kernel's list has no uuids (interface before 4.45); empty for a device without one.
    pub(crate) uuid: Option<String>,
}

/// Reads the entries of `DM_LIST_DEVICES`: `struct dm_name_list`, then 8-aligned the event number and, from
/// interface 4.45 on, a word that says whether a uuid follows (`list_devices`, `drivers/md/dm-ioctl.c`).
pub(crate) fn listed(payload: &[u8], uuids: bool) -> Vec<Listed> {
    let mut devices = Vec::new();
    let mut rest = payload;
    while rest.get(..8).is_some_and(|dev| dev != [0; 8]) {
        let Some(next) = u32_at(rest, 8) else { break };
        let entry = if next == 0 {
            rest
        } else {
            rest.get(..next as usize).unwrap_or(rest)
        };
        let Some(device) = listed_one(entry, uuids) else {
            break;
        };
        devices.push(device);
        match rest.get(next as usize..) {
            Some(following) if next >= 12 => rest = following,
            _ => break,
        }
    }
    devices
}

fn listed_one(entry: &[u8], uuids: bool) -> Option<Listed> {
    let field = entry.get(12..)?;
    let length = field.iter().position(|byte| *byte == 0)?;
    let name = text(field);
    let event = (12 + length + 1).next_multiple_of(8);
    let uuid = match u32_at(entry, event + 4) {
        Some(HAS_UUID) if uuids => Some(text(entry.get(event + 8..)?)),
        Some(HAS_NO_UUID) if uuids => Some(String::new()),
        _ => None,
    };
    Some(Listed { name, uuid })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::headers;

    /// `UUID` was 1 << 15, which is `DM_SECURE_DATA_FLAG`: adopting a foreign device renamed it instead of giving it a
    /// uuid, and no list ever had uuids in it. Every test compared the constant with itself.
    #[test]
    fn flags_are_the_kernels() {
        headers::assert_agree(&[
            (SUSPEND, "DM_SUSPEND_FLAG"),
            (STATUS_TABLE, "DM_STATUS_TABLE_FLAG"),
            (ACTIVE_PRESENT, "DM_ACTIVE_PRESENT_FLAG"),
            (INACTIVE_PRESENT, "DM_INACTIVE_PRESENT_FLAG"),
            (BUFFER_FULL, "DM_BUFFER_FULL_FLAG"),
            (SKIP_LOCKFS, "DM_SKIP_LOCKFS_FLAG"),
            (NOFLUSH, "DM_NOFLUSH_FLAG"),
            (QUERY_INACTIVE_TABLE, "DM_QUERY_INACTIVE_TABLE_FLAG"),
            (UUID, "DM_UUID_FLAG"),
            (DEFERRED_REMOVE, "DM_DEFERRED_REMOVE"),
            (HAS_UUID, "DM_NAME_LIST_FLAG_HAS_UUID"),
            (HAS_NO_UUID, "DM_NAME_LIST_FLAG_DOESNT_HAVE_UUID"),
        ]);
    }

    #[test]
    fn fields_lie_where_the_kernel_has_them() {
        let pins = [
            (HEAD_BYTES, "sizeof(struct dm_ioctl)"),
            (0, "offsetof(struct dm_ioctl, version)"),
            (12, "offsetof(struct dm_ioctl, data_size)"),
            (DATA_START, "offsetof(struct dm_ioctl, data_start)"),
            (TARGET_COUNT, "offsetof(struct dm_ioctl, target_count)"),
            (OPEN_COUNT, "offsetof(struct dm_ioctl, open_count)"),
            (FLAGS, "offsetof(struct dm_ioctl, flags)"),
            (EVENT_NR, "offsetof(struct dm_ioctl, event_nr)"),
            (DEV, "offsetof(struct dm_ioctl, dev)"),
            (NAME, "offsetof(struct dm_ioctl, name)"),
            (UUID_FIELD, "offsetof(struct dm_ioctl, uuid)"),
            (NAME_BYTES, "sizeof((struct dm_ioctl){}.name)"),
            (UUID_BYTES, "sizeof((struct dm_ioctl){}.uuid)"),
            (0, "offsetof(struct dm_target_spec, sector_start)"),
            (8, "offsetof(struct dm_target_spec, length)"),
            (NEXT, "offsetof(struct dm_target_spec, next)"),
            (TARGET_TYPE, "offsetof(struct dm_target_spec, target_type)"),
            (SPEC_BYTES, "sizeof(struct dm_target_spec)"),
            (8, "offsetof(struct dm_name_list, next)"),
            (12, "offsetof(struct dm_name_list, name)"),
            (4, "offsetof(struct dm_target_versions, version)"),
        ];
        headers::assert_agree(&pins.map(|(ours, theirs)| (ours as u64, theirs)));
    }

    #[test]
    fn a_head_holds_what_was_put_in_it() {
        let number = DeviceNumber {
            major: 254,
            minor: 300,
        };
        let mut head = Head::to(Address::Number(number))
            .with_flags(SUSPEND)
            .with_cookie(0x6f_0000);
        assert_eq!(
            (head.number(), head.flags(), head.name()),
            (number, SUSPEND, String::new())
        );
        assert_eq!(
            &head.bytes_mut()[..12],
            [4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
        );
        assert_eq!(head.bytes_mut()[32..36], 0x6f_0000u32.to_ne_bytes());
        let long = "u".repeat(128);
        assert_eq!(Head::to(Address::Uuid(&long)).uuid(), long);
        assert_eq!(Head::to(Address::Name("vm")).name(), "vm");
    }

    #[test]
    fn a_status_is_read_only_if_it_is_whole() {
        let mut payload = vec![0; 40];
        payload[24..32].copy_from_slice(b"snapshot");
        payload.extend(b"16/2048 16\0\0\0");
        assert_eq!(first_target(&payload), Some(("snapshot", "16/2048 16")));
        for cut in 0..51 {
            assert_eq!(first_target(&payload[..cut]), None, "{cut}");
        }
        payload[41] = 0xff;
        assert_eq!(first_target(&payload), None, "not UTF-8");
    }

    #[test]
    fn several_targets_are_written_one_behind_the_other_and_read_again() {
        let targets = [
            ([0, 2048], "error", ""),
            ([2048, 8], "linear", "7:300 0"),
            ([2056, 8], "linear", "254:12 0"),
        ];
        let message = Message::new(vec![0; HEAD_BYTES + 3 * TARGET_ROOM]).with_targets(&targets);
        assert_eq!(message.target_count(), 3);
        let mut payload = message.payload().to_vec();
        let starts: Vec<_> = payload
            .chunks(TARGET_ROOM)
            .map(|spec| spec[..2].to_vec())
            .collect();
        assert_eq!(starts, [[0, 0], [0, 8], [8, 8]]);
        // The kernel counts from the first one.
        for nth in 1..=3_usize {
            let next = u32::try_from(nth * TARGET_ROOM).expect("small");
            let at = (nth - 1) * TARGET_ROOM + NEXT;
            payload[at..at + 4].copy_from_slice(&next.to_ne_bytes());
        }
        let texts = targets.map(|(_, kind, params)| (kind, params));
        assert_eq!(lines(&payload, 3), texts);
        for cut in 0..payload.len() {
            assert!(texts.starts_with(&lines(&payload[..cut], 3)));
        }
    }

    fn entry(name: &str, uuid: Option<&str>, last: bool) -> Vec<u8> {
        let mut bytes = vec![1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        bytes.extend(name.bytes().chain([0]));
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes.extend(7u32.to_ne_bytes());
        bytes.extend(if uuid.is_some() { 1u32 } else { 2 }.to_ne_bytes());
        bytes.extend(uuid.unwrap_or_default().bytes().chain([0]));
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        let next = u32::try_from(bytes.len()).expect("small");
        bytes[8..12].copy_from_slice(&if last { 0 } else { next }.to_ne_bytes());
        bytes
    }

    #[test]
    fn lists_are_read_with_and_without_uuids_and_never_past_their_end() {
        let mut payload = entry("vm-1", Some("DMSNAP-1"), false);
        payload.extend(entry("swap", None, true));
        let names = |devices: Vec<Listed>| {
            devices
                .into_iter()
                .map(|device| device.name)
                .collect::<Vec<_>>()
        };
        let devices = listed(&payload, true);
        assert_eq!(
            devices[0],
            Listed {
                name: "vm-1".into(),
                uuid: Some("DMSNAP-1".into())
            }
        );
        assert_eq!(
            devices[1],
            Listed {
                name: "swap".into(),
                uuid: Some(String::new())
            }
        );
        assert_eq!(listed(&payload, false)[0].uuid, None);
        assert_eq!(listed(&[0; 64], true), []);
        for cut in 0..payload.len() {
            assert!(names(listed(&payload[..cut], true)).len() <= 2);
        }
        payload[8..12].copy_from_slice(&4u32.to_ne_bytes());
        assert!(
            listed(&payload, true).len() <= 1,
            "an entry that points into itself ends the list"
        );
    }
}
