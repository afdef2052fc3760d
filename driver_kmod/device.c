// SPDX-License-Identifier: GPL-2.0-only
/*
 * The life of a device: features, queues, probe, remove, suspend. What the
 * queues are for is in the files named after them.
 */
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/slab.h>
#include <linux/virtio_ids.h>

#include "vbw.h"

/**
 * vbw_wake - callback of a queue: a buffer was used
 * @vq: the queue
 */
void vbw_wake(struct virtqueue *vq)
{
	struct vbw_device *vb = vq->vdev->priv;

	wake_up(&vb->acked);
}

static void walk_wake(struct virtqueue *vq)
{
	struct vbw_device *vb = vq->vdev->priv;

	virtqueue_disable_cb(vq);
	wake_up(&vb->session.push.wait);
}

/**
 * vbw_queue_work - queue work unless the device is going away
 * @vb: the device
 * @wq: the workqueue
 * @work: the work
 *
 * Return: whether it was queued by this call.
 */
bool vbw_queue_work(struct vbw_device *vb, struct workqueue_struct *wq, struct work_struct *work)
{
	unsigned long flags;
	bool queued = false;

	spin_lock_irqsave(&vb->stop_lock, flags);
	if (!vb->stop)
		queued = queue_work(wq, work);
	spin_unlock_irqrestore(&vb->stop_lock, flags);
	return queued;
}

/*
 * One row for each queue, in the order of the standard. A queue whose feature
 * was not negotiated has no name, and the transport numbers those that have
 * one without a gap.
 */
static const struct {
	const char *name;
	vq_callback_t *callback;
	int feature;		/* -1: always there */
} queues[VBW_VQ_MAX] = {
	[VBW_VQ_INFLATE] = { "inflate", vbw_wake, -1 },
	[VBW_VQ_DEFLATE] = { "deflate", vbw_wake, -1 },
	[VBW_VQ_STATS] = { "stats", vbw_stats_request, VBALLOON_F_STATS_VQ },
	[VBW_VQ_HINT] = { "free_page_vq", vbw_wake, VBALLOON_F_FREE_PAGE_HINT },
	[VBW_VQ_REPORTING] = { "reporting_vq", vbw_wake, VBALLOON_F_PAGE_REPORTING },
	[VBW_VQ_WALK] = { "walk_vq", walk_wake, VBALLOON_F_FREE_PAGE_WALK },
};

static bool has_queue(struct vbw_device *vb, int i)
{
	return queues[i].feature < 0 || vbw_has(vb, queues[i].feature);
}

#ifdef VBW_HAVE_VIRTQUEUE_INFO
static int find_vqs(struct vbw_device *vb)
{
	struct virtqueue_info info[VBW_VQ_MAX] = {};
	int i;

	for (i = 0; i < VBW_VQ_MAX; i++) {
		if (!has_queue(vb, i))
			continue;
		info[i].name = queues[i].name;
		info[i].callback = queues[i].callback;
	}
	return virtio_find_vqs(vb->vdev, VBW_VQ_MAX, vb->vqs, info, NULL);
}
#else
static int find_vqs(struct vbw_device *vb)
{
	vq_callback_t *callbacks[VBW_VQ_MAX] = {};
	const char *names[VBW_VQ_MAX] = {};
	int i;

	for (i = 0; i < VBW_VQ_MAX; i++) {
		if (!has_queue(vb, i))
			continue;
		names[i] = queues[i].name;
		callbacks[i] = queues[i].callback;
	}
	return virtio_find_vqs(vb->vdev, VBW_VQ_MAX, vb->vqs, callbacks, names, NULL);
}
#endif

static int init_vqs(struct vbw_device *vb)
{
	int err;

	err = find_vqs(vb);
	if (err)
		goto err_forget;
	if (!vb->vqs[VBW_VQ_STATS])
		return 0;
	err = vbw_stats_prime(vb);
	if (err)
		goto err_vqs;
	return 0;

err_vqs:
	vb->vdev->config->del_vqs(vb->vdev);
err_forget:
	memset(vb->vqs, 0, sizeof(vb->vqs));
	return err;
}

static void del_vqs(struct vbw_device *vb)
{
	vb->vdev->config->del_vqs(vb->vdev);
	memset(vb->vqs, 0, sizeof(vb->vqs));
}

/* The value that free pages are expected to keep, before DRIVER_OK. */
static void write_poison(struct vbw_device *vb)
{
	u32 poison = 0;

	if (!vbw_has(vb, VBALLOON_F_PAGE_POISON))
		return;
	if (!want_init_on_free())
		memset(&poison, PAGE_POISON, sizeof(poison));
	virtio_cwrite_le(vb->vdev, struct vballoon_config, poison_val, &poison);
}

static void start(struct vbw_device *vb)
{
	spin_lock_irq(&vb->stop_lock);
	vb->stop = false;
	spin_unlock_irq(&vb->stop_lock);
	virtio_device_ready(vb->vdev);
	vbw_session_start(vb);
}

static void changed(struct virtio_device *vdev)
{
	struct vbw_device *vb = vdev->priv;

	vbw_balloon_changed(vb);
	vbw_hinting_changed(vb);
	vbw_session_changed(vb);
}

/* No work is queued any more, and none runs. */
static void quiesce(struct vbw_device *vb)
{
	spin_lock_irq(&vb->stop_lock);
	vb->stop = true;
	spin_unlock_irq(&vb->stop_lock);
	vbw_session_stop(vb);
	vbw_hinting_stop(vb);
	cancel_work_sync(&vb->balloon.resize);
	vbw_stats_stop(vb);
}

/* Gives all memory back, then the device gets no more of it. */
static void let_go(struct vbw_device *vb)
{
	vbw_balloon_deflate_all(vb);
	vbw_hinting_release(vb);
	virtio_reset_device(vb->vdev);
	if (vb->session.push.vq)
		vbw_push_detach(&vb->session.push);
	del_vqs(vb);
}

static struct vbw_device *allocate(struct virtio_device *vdev)
{
	struct vbw_device *vb = kzalloc(sizeof(*vb), GFP_KERNEL);

	if (!vb)
		return NULL;
	vb->vdev = vdev;
	init_waitqueue_head(&vb->acked);
	spin_lock_init(&vb->stop_lock);
	vbw_balloon_setup(vb);
	vbw_stats_setup(vb);
	vbw_hinting_setup(vb);
	return vb;
}

static int probe(struct virtio_device *vdev)
{
	struct vbw_device *vb;
	int err;

	if (!vdev->config->get) {
		dev_err(&vdev->dev, "no configuration space\n");
		return -EINVAL;
	}
	vb = allocate(vdev);
	if (!vb)
		return -ENOMEM;
	vdev->priv = vb;
	vb->wq = alloc_ordered_workqueue("vballoon-walk", WQ_FREEZABLE);
	if (!vb->wq) {
		err = -ENOMEM;
		goto err_free;
	}
	err = vbw_session_setup(vb);
	if (err)
		goto err_wq;
	err = init_vqs(vb);
	if (err)
		goto err_session;
	err = vbw_hinting_start(vb);
	if (err)
		goto err_vqs;
	err = vbw_balloon_start(vb);
	if (err)
		goto err_hinting;
	write_poison(vb);
	err = vbw_reporting_start(vb);
	if (err)
		goto err_balloon;
	start(vb);
	vbw_debugfs_add(vb);
	changed(vdev);
	return 0;

err_balloon:
	vbw_balloon_stop(vb);
err_hinting:
	vbw_hinting_end(vb);
err_vqs:
	del_vqs(vb);
err_session:
	vbw_session_free(vb);
err_wq:
	destroy_workqueue(vb->wq);
err_free:
	kfree(vb);
	return err;
}

static void remove(struct virtio_device *vdev)
{
	struct vbw_device *vb = vdev->priv;

	vbw_debugfs_remove(vb);
	vbw_reporting_stop(vb);
	vbw_balloon_stop(vb);
	quiesce(vb);
	vbw_hinting_end(vb);
	let_go(vb);
	vbw_session_free(vb);
	destroy_workqueue(vb->wq);
	kfree(vb);
}

#ifdef CONFIG_PM_SLEEP
static int freeze(struct virtio_device *vdev)
{
	struct vbw_device *vb = vdev->priv;

	vbw_reporting_stop(vb);
	quiesce(vb);
	let_go(vb);
	return 0;
}

static int restore(struct virtio_device *vdev)
{
	struct vbw_device *vb = vdev->priv;
	int err;

	err = init_vqs(vb);
	if (err)
		return err;
	write_poison(vb);
	err = vbw_reporting_start(vb);
	if (err) {
		del_vqs(vb);
		return err;
	}
	start(vb);
	changed(vdev);
	vbw_balloon_update_actual(vb);
	return 0;
}
#endif

/* Features that this guest has no use for, before they are negotiated. */
static int validate(struct virtio_device *vdev)
{
	/*
	 * Where free pages are neither cleared nor poisoned, the device need
	 * not know of a value. Where they are and it does not know the value,
	 * what reporting brings back would be taken for corrupted.
	 */
	if (!want_init_on_free() && !page_poisoning_enabled_static())
		__virtio_clear_bit(vdev, VBALLOON_F_PAGE_POISON);
	else if (!virtio_has_feature(vdev, VBALLOON_F_PAGE_POISON))
		__virtio_clear_bit(vdev, VBALLOON_F_PAGE_REPORTING);

	/* Little-endian structures throughout: wrong for this guest without. */
	if (IS_ENABLED(CONFIG_CPU_BIG_ENDIAN) && !virtio_has_feature(vdev, VIRTIO_F_VERSION_1))
		return -EINVAL;

	/* Page numbers are physical, whatever stands between. */
	__virtio_clear_bit(vdev, VIRTIO_F_ACCESS_PLATFORM);
	return 0;
}

static const struct virtio_device_id id_table[] = {
	{ VIRTIO_ID_BALLOON, VIRTIO_DEV_ANY_ID },
	{ 0 },
};
MODULE_DEVICE_TABLE(virtio, id_table);

static const unsigned int features[] = {
	VBALLOON_F_MUST_TELL_HOST,
	VBALLOON_F_STATS_VQ,
	VBALLOON_F_DEFLATE_ON_OOM,
	VBALLOON_F_FREE_PAGE_HINT,
	VBALLOON_F_PAGE_POISON,
	VBALLOON_F_PAGE_REPORTING,
	VBALLOON_F_FREE_PAGE_WALK,
};

struct virtio_driver vbw_driver = {
	.feature_table = features,
	.feature_table_size = ARRAY_SIZE(features),
	.driver.name = KBUILD_MODNAME,
	.driver.owner = THIS_MODULE,
	.id_table = id_table,
	.validate = validate,
	.probe = probe,
	.remove = remove,
	.config_changed = changed,
#ifdef CONFIG_PM_SLEEP
	.freeze = freeze,
	.restore = restore,
#endif
};
