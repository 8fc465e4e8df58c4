//! The crates loopdev and devicemapper, as their documentation suggests: attach, table, resume; remove, detach.

use std::fs::File;
use std::io::{Seek, SeekFrom};

use devicemapper::{DM, DevId, DmName, DmOptions};
use loopdev::{LoopControl, LoopDevice};

use super::{Contestant, Job, Made, Result, names};

pub(super) struct Crates {
    loops: LoopControl,
    mapper: DM,
    made: Made<[LoopDevice; 2]>,
}

impl Crates {
    pub(super) fn new() -> Result<Self> {
        Ok(Self {
            loops: LoopControl::open()?,
            mapper: DM::new()?,
            made: Made::default(),
        })
    }
}

impl Contestant for Crates {
    fn name(&self) -> &'static str {
        names::CRATES
    }

    fn create(&mut self, job: Job<'_>) -> Result<()> {
        let origin = self.loops.next_free()?;
        origin.with().read_only(true).attach(job.image)?;
        let cow = self.loops.next_free()?;
        cow.with().attach(job.cow)?;
        let path = |device: &LoopDevice| device.path().ok_or("a loop device without a path");
        let sectors = File::open(path(&origin)?)?.seek(SeekFrom::End(0))? / 512;
        let (origin_path, cow_path) = (path(&origin)?, path(&cow)?);
        let devices = format!("{} {}", origin_path.display(), cow_path.display());
        let params = format!("{devices} {}", job.store_and_chunk());
        let name = DmName::new(job.name)?;
        self.mapper
            .device_create(name, None, DmOptions::default())?;
        let id = DevId::Name(name);
        let table = (0, sectors, "snapshot".to_owned(), params);
        self.mapper
            .table_load(&id, &[table], DmOptions::default())?;
        self.mapper.device_suspend(&id, DmOptions::default())?;
        self.made.keep(&job, [cow, origin]);
        Ok(())
    }

    fn remove(&mut self, job: Job<'_>) -> Result<()> {
        let id = DevId::Name(DmName::new(job.name)?);
        self.mapper.device_remove(&id, DmOptions::default())?;
        for device in self.made.take(&job)? {
            device.detach()?;
        }
        Ok(())
    }
}
